"""Work bounded by what the machine does: processor time in turns of a loop that is timed on the same machine.

A bound in seconds says something about the machine that a test happens to run on. A turn of the loop is an addition in
pure Python; ten million of them take a third of a second to a whole one, as machines and their other work go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

TURNS = 500_000  # that are timed: 15 to 50 ms
LITTLE = 150_000_000  # turns that what is refused may take: seconds; what is not refused takes minutes
SOME = 2 * LITTLE


def loop_s() -> float:
    """Seconds of processor time that a turn takes now."""
    begun = time.thread_time()
    total = 0
    for i in range(TURNS):
        total += i
    return (time.thread_time() - begun) / TURNS


@cache
def first_loop_s() -> float:
    """As `loop_s`, once in a process."""
    return loop_s()


@contextmanager
def bounded_work(most: int = LITTLE, clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
    """Fail if the block takes more than so many turns of the loop.

    The loop is timed before the first block. A block that misses its bound by that time is compared with the loop as it
    runs right behind it: the machine may have become slower in between.

    Args:
        most: turns.
        clock: seconds of this thread, of all threads (`time.process_time`), or, where other processes do the work, of
            the day (`time.monotonic`).
    """
    turn = first_loop_s()
    begun = clock()
    try:
        yield
    finally:
        taken = clock() - begun
        if taken > most * turn:
            turn = max(turn, loop_s())
        assert taken <= most * turn, f"{taken:.2f} s are {taken / turn:,.0f} turns of the loop, {most:,} are allowed"
