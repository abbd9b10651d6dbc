"""Ctrl-C during an answer: the first one only asks to end at the next token."""

from __future__ import annotations

import signal
import threading
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
