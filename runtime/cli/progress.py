"""A line of progress on a terminal's stderr; nothing at all where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

WIDTH = 24  # of the bar
EVERY_S = 0.1


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
        return f"{what}  {done / 1e6:.1f} MB written, {seconds:.0f} s"
    filled = WIDTH * min(done, total) // total
    return f"{what}  [{'#' * filled}{'-' * (WIDTH - filled)}]  {done / 1e6:.1f} of {total / 1e6:.1f} MB"
