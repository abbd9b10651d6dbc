"""Entry points of the commands. Around the command itself Ctrl-C ends the process without a word.

Python would print a traceback where it is still importing modules, or already cleaning up. So this module imports
nothing that takes a while, and the command line only once SIGINT is seen to.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # what is beneath signal, whose enumerations take as long as all else here
import os
import sys

INTERRUPTED = 130  # exit code, as a shell says it of what SIGINT has ended


def main() -> None:
    """Entry point of ``kvq``."""
    _run("main")


def run_main() -> None:
    """Entry point of ``kvq-run``."""
    _run("run_main")


def _run(name: str) -> None:
    """Call this function of `kvq.runtime.cli.main`, with SIGINT as Python has it meanwhile."""
    usual = signal.getsignal(signal.SIGINT)
    _see_to_interrupts(usual)
    from kvq.runtime.cli import main as command_line

    try:
        signal.signal(signal.SIGINT, usual)
        getattr(command_line, name)()
    except KeyboardInterrupt:  # before the command has begun to see to it, or after
        sys.exit(INTERRUPTED)
    finally:
        _see_to_interrupts(usual)


def _see_to_interrupts(usual: object) -> None:
    if usual is not signal.SIG_IGN:  # what a shell starts in the background is not to be interrupted
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)  # nothing has been begun, or all is done
