"""One thread at a time: what two would do to one session at once is an error, not a mixture of two texts."""

from __future__ import annotations

import threading

from kvq.runtime.errors import SessionError


class Exclusive:
    """To be held while a session is changed or copied; the thread that holds it may take it again.

    Raises:
        SessionError: another thread holds it; nothing was done.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise in_use()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def in_use() -> SessionError:
    """What a second thread is told."""
    return SessionError(
        "another thread is using this session; let them take turns, or give each thread a session of its own"
        " (session.fork() makes one of the same text)"
    )
