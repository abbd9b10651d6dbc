"""``python -m kvq`` is the ``kvq`` command."""

from kvq.runtime.cli.main import main

main()
