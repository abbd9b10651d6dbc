"""Attention alone over a session's packed cache, beside a plain read of the same bytes.

Both take the layers, or the pages, of one cache in as many threads, so what separates them is arithmetic: a
ratio of one means that attention is as fast as memory.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvq.runtime.session.session import Session

REPEATS = 7


def attention_beside_read(session: Session, threads: int) -> dict[str, Any]:
    """Best times of some passes over all layers; nothing where attention is not native.

    Returns:
        {"attention_ms", "attention_gb_per_s", "read_gb_per_s" (plain), "attention_of_read" (their ratio)}.
    """
    store = session.store
    if session.backend.name != "native" or not store.length:
        return {}
    with ThreadPoolExecutor(threads) as pool:
        attention = _best(pool, _attention_parts(session, threads))
        read = _best(pool, _read_parts(session, threads))
    nbytes = store.used_nbytes
    held = sum(array.nbytes for array in _arrays(session))
    return {
        "attention_ms": 1e3 * attention,
        "attention_gb_per_s": nbytes / attention / 1e9,
        "read_gb_per_s": held / read / 1e9,
        "attention_of_read": (nbytes / attention) / (held / read),
    }


def _best(pool: ThreadPoolExecutor, parts: list[Callable[[], Any]]) -> float:
    """Seconds of the fastest pass over all parts, one thread each."""
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for done in [pool.submit(part) for part in parts]:
            done.result()
        best = min(best, time.perf_counter() - begun)
    return best


def _attention_parts(session: Session, threads: int) -> list[Callable[[], None]]:
    """For each thread a decode step's attention over its share of the layers."""
    from kvq.runtime.native.library import Pass, Rows, choose_kernel, load
    from kvq.runtime.native.table import PageTable

    shape, library = session.model.architecture, load()
    table = PageTable()  # kept alive by the parts, as the arrays are
    rows = table.update(session.store)
    rng = np.random.default_rng(0)

    def part(layers: range) -> Callable[[], None]:
        query, out = (rng.standard_normal((shape.heads, shape.head_dim), np.float32) for _ in range(2))
        new = rng.standard_normal((shape.kv_heads, shape.head_dim), np.float32)
        widths = (shape.heads * shape.head_dim, new.size, new.size)
        arrays = (x.ctypes.data for x in (query, new, new, out))
        forward = Pass(
            *(shape.layers, shape.heads, shape.kv_heads, shape.head_dim, 1, len(rows), choose_kernel()[1], 1),
            rows.ctypes.data,
        )
        given = Rows(*arrays, *widths, None)

        def run(held: Any = (query, new, out, table)) -> None:
            for layer in layers:
                library.kvq_attend(ctypes.byref(forward), layer, ctypes.byref(given), None, None)

        return run

    return [part(range(i, shape.layers, threads)) for i in range(threads)]


def _arrays(session: Session) -> list[np.ndarray]:
    """Codes and scales of all pages."""
    pages = [page for bucket in session.store.buckets.values() for page in bucket.pages]
    sides = [side for page in pages for side in (page.keys, page.values)]
    return [array for side in sides for array in (side.codes, side.scales) if array.nbytes]


def _read_parts(session: Session, threads: int) -> list[Callable[[], int]]:
    """For each thread a read of its share of the pages' arrays."""
    words = [array.reshape(-1).view(np.uint64) for array in _arrays(session)]

    def part(mine: list[np.ndarray]) -> Callable[[], int]:
        return lambda: sum(int(np.bitwise_or.reduce(array)) & 1 for array in mine)

    return [part(words[i::threads]) for i in range(threads)]
