"""The physical floor: how fast this machine reads memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

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
    best = 0.0
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begun = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = max(best, array.nbytes / (time.perf_counter() - begun))
    return best
