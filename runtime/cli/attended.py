"""The command line, or a module, as another kvq's child: ends when that one does, however it was ended.

``python -P -m kvq.runtime.cli.attended COMMAND ...``, ``python -P attended.py -m MODULE ...``; stdin is a pipe that the
parent holds and never writes to.
"""

from __future__ import annotations

import os
import sys
import threading

LEFT = 130  # exit code, which nobody reads any more


def attend() -> None:
    """End this process when stdin does: systems close a pipe of whoever dies, SIGKILL included."""
    parent = os.dup(0)
    with open(os.devnull, "rb") as nothing:  # in its place: Windows makes others wait who look at a stdin that is read
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        while os.read(parent, 1):
            pass
        os._exit(LEFT)  # no cleaning: what a killed export leaves is swept by the next command

    threading.Thread(target=watch, name="kvq-attended", daemon=True).start()


def main() -> None:
    """Entry point."""
    attend()
    if sys.argv[1:2] == ["-m"]:  # another's, which needs no kvq
        import runpy

        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    from kvq.runtime.cli.main import main as command_line  # only now: it takes a while

    command_line()


if __name__ == "__main__":
    main()
