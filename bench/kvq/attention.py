"""Attention alone over a session's packed cache, beside a plain read of the same bytes.

Both take the layers, or the pages, of one cache in as many threads, so what separates them is arithmetic: a ratio of
one means that attention is as fast as memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvq.bench.floor import fastest
from kvq.runtime.session.session import Session

REPEATS = 7


def attention_beside_read(session: Session, threads: int) -> dict[str, Any]:
    """Best times of some passes over all layers; nothing where attention is not native.

    Returns:
        {"attention_ms", "attention_gb_per_s", "read_gb_per_s" (plain), "attention_of_read" (their ratio)}.
    """
    if session.backend.name != "native" or not session.store.length:
        return {}
    pages = [page for bucket in session.store.buckets.values() for page in bucket.pages]
    sides = [slots for page in pages for side in (page.keys, page.values) for slots in side.slots]
    arrays = [array for side in sides for array in (side.codes, side.scales) if array.nbytes]
    words = [array.reshape(-1).view(np.uint64) for array in arrays]

    def read_part(number: int) -> int:
        return sum(int(np.bitwise_or.reduce(array)) & 1 for array in words[number::threads])

    attention = fastest(_attention_parts(session, threads), threads, REPEATS)
    read = fastest([partial(read_part, number) for number in range(threads)], threads, REPEATS)
    speed, read_speed = session.store.used_nbytes / attention, sum(array.nbytes for array in arrays) / read
    return {
        "attention_ms": 1e3 * attention,
        "attention_gb_per_s": speed / 1e9,
        "read_gb_per_s": read_speed / 1e9,
        "attention_of_read": speed / read_speed,
    }


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
