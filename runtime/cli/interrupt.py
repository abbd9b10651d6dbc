"""Signals during an answer: the first one only asks to end at the next token."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """In a `with` block, what Ctrl-C means: from `arm` on, the first one only asks to end at the next token.

    Before that, and a second time, it interrupts as usual: a forward pass must not be cut in the middle, but a
    half-read prompt is not worth keeping.

    Args:
        enabled: without, it interrupts as usual all the time.

    Attributes:
        asked: whether the user has asked to end.
    """

    def __init__(self, enabled: bool) -> None:
        self.asked = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._armed = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._armed:
            raise KeyboardInterrupt
        self.asked = True

    def arm(self) -> None:
        """What there is from now on is worth keeping."""
        self._armed = self._enabled


ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Leaving:
    """In a `with` block, a process that is told to end, or whose terminal is closed, leaves by SystemExit.

    So what a chat has said can still be saved. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self._answer: Interrupt | None = None
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Leaving:
        if threading.current_thread() is threading.main_thread():
            kept = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
            self._before = {number: signal.signal(number, self._handle) for number in kept}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def after(self, answer: Interrupt) -> Iterator[None]:
        """In this block it leaves when the block has come to its end, for which it asks as Ctrl-C does."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None
        self._leave()

    def _leave(self) -> None:
        if self._number:
            raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)
        if self._answer is None:
            self._leave()
        else:
            self._answer.asked = True
