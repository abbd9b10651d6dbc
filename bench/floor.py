"""The physical floor, how fast this machine reads memory, and the clock that all times are taken with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

ARRAY_BYTES = 1 << 30  # beyond the last-level cache of a large server


def read_bandwidth(threads: int, nbytes: int = ARRAY_BYTES, repeats: int = 5) -> float:
    """Bytes a second that `threads` threads read from memory together: the best of some passes.

    Each thread takes dot products of its own part of one array with itself, which reads every
    byte once; BLAS itself is held to one thread.
    """
    array = np.ones(nbytes // 4, np.float32)
    # Long parts lose nothing to Python, short ones keep a thread that was held up from being waited for.
    parts = np.array_split(array, threads * 16)
    with threadpool_limits(1, user_api="blas"):
        return array.nbytes / fastest([partial(np.dot, part, part) for part in parts], threads, repeats)


def fastest(parts: Sequence[Callable[[], object]], threads: int, repeats: int) -> float:
    """Seconds of the best of some passes over all parts, by so many threads together."""
    with ThreadPoolExecutor(threads) as pool:
        return min(taken(lambda: list(pool.map(lambda part: part(), parts))) for _ in range(repeats))


def taken(work: Callable[..., object], *arguments: Any) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun
