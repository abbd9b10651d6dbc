"""What becomes of a process that writes to a pipe or connection that nobody reads any more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_with_a_closed_pipe() -> None:
    """From now on the process ends by SIGPIPE, quietly, as a filter in a shell does (`kvq-run ... | head`)."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@contextmanager
def outlasting_connections() -> Iterator[None]:
    """In this block a connection that the other side has closed is an error (BrokenPipeError), and no end.

    Whatever talks to others has to run in one: else a client could end a server by going away. Signals are the main
    thread's; in others the block changes nothing.
    """
    if not hasattr(signal, "SIGPIPE") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)
