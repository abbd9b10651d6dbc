"""Processes that tests interrupt."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """For `preexec_fn`: what a shell runs in the background has SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
