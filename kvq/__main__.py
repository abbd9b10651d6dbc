"""``python -m kvq`` is the ``kvq`` command."""

from kvq.runtime.cli.entry import main

main()
