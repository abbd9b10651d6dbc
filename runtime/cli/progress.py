"""Progress on a terminal's stderr; nothing at all where stderr is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

WIDTH = 24  # of the bar
EVERY_S = 0.1
# Fewer tokens are read before a bar could be looked at.
LEAST_TOKENS = 256


def drawn(done: int, total: int, beside: int) -> str:
    """A bar of `WIDTH` characters in brackets, shorter where the terminal has not that many beside so many others."""
    columns = shutil.get_terminal_size().columns - 1  # one that is full begins a new line
    width = max(0, min(WIDTH, columns - beside - len("[]")))
    filled = width * min(done, total) // total
    return f"[{'#' * filled}{'-' * (width - filled)}]"


def fitted(text: str) -> str:
    """As much of a line as the terminal has room for: what is beyond could not be cleared."""
    return text[: max(1, shutil.get_terminal_size().columns - 1)]


class Bar:
    """A line that grows with what is done, tokens read most often, and is gone before text comes.

    Called as `Session.append`'s progress.

    Args:
        shown: whether the user wants it; it is drawn on a terminal only.
        what, unit: what is done, and to what.
        least: up to so many are done before a bar could be looked at.
    """

    def __init__(
        self, shown: bool = True, what: str = "reading", unit: str = "tokens", least: int = LEAST_TOKENS
    ) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._what, self._unit, self._least = what, unit, least
        self._columns = 0  # characters on the line
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._shown or total <= self._least or now < self._last + EVERY_S:
            return
        self._last = now
        behind = f" {done:,} of {total:,} {self._unit}"
        text = fitted(f"{self._what} {drawn(done, total, len(self._what) + 1 + len(behind))}{behind}")
        sys.stderr.write("\r" + text.ljust(self._columns))
        sys.stderr.flush()
        self._columns = len(text)

    def clear(self) -> None:
        """Leave the line empty and the cursor at its beginning, as it was."""
        if self._columns:
            sys.stderr.write("\r" + " " * self._columns + "\r")
            sys.stderr.flush()
            self._columns = 0


@contextmanager
def progress_line() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A function to be told what is being done, and bytes done and in total; the line is gone when the block ends.

    None where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    begun, shown, label = time.monotonic(), 0.0, ""

    def report(what: str, done: int, total: int | None) -> None:
        nonlocal begun, shown, label
        now = time.monotonic()
        if what != label:
            begun, label = now, what
        elif now - shown < EVERY_S:
            return
        shown = now
        click.echo(f"\r\x1b[K{line(what, done, total, now - begun)}", nl=False, err=True)

    try:
        yield report
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


def line(what: str, done: int, total: int | None, seconds: float) -> str:
    """What the terminal shows."""
    if total is None:
        return fitted(f"{what}  {done / 1e6:.1f} MB written, {seconds:.0f} s")
    behind = f"  {done / 1e6:.1f} of {total / 1e6:.1f} MB"
    return fitted(f"{what}  {drawn(done, total, len(what) + 2 + len(behind))}{behind}")
