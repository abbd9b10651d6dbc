"""What the native library needs to let the tokens of a pass see what single steps would see."""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.kv.store import KVStore
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.native.library import PAGE, Moves, MoveStep
from kvq.runtime.native.mover import write_steps
from kvq.runtime.native.table import PageTable, address_of
from kvq.runtime.native.turns import MovedTurns


class StepwiseTable:
    """A page table on which tokens go their way while a pass is running.

    The store stays as it is: the way through the window is gone in a copy of it, and the pages are written
    behind their last token, where `KVStore.append` puts the same bytes afterwards.
    """

    def __init__(self, kernel: int) -> None:
        self._kernel = kernel
        self._table = PageTable()
        self._window: RecentWindow | None = None
        self._turned = MovedTurns()

    def update(self, store: KVStore, keys: np.ndarray, values: np.ndarray) -> tuple[PageTable, Moves]:
        """The table before the first new token, and the way of all but the last; valid until the next call.

        keys, values: float32 [layers, kv_heads, tokens, head_dim], written by the pass before they are read.
        """
        layers, kv_heads, tokens, head_dim = keys.shape
        moves = store.moves_ahead(tokens - 1)
        if self._window is None or (self._window.capacity, self._window.bits) != (
            store.window.capacity,
            store.window.bits,
        ):
            self._window = store.window.copy()
        else:
            self._window.take(store.window)
        self._table.update(store, self._window)
        table = self._table
        self._steps = (MoveStep * len(moves))()
        write_steps(self._steps, moves, table.pages)
        window = table.address + len(table.pages) * PAGE.itemsize
        given = Moves(
            *(layers, kv_heads, head_dim, self._kernel, tokens, len(table.pages)),
            *(keys.ctypes.data, values.ctypes.data, address_of(store.codecs.feedback)),
            *(window, table.address, ctypes.addressof(self._steps)),
        )
        self._turned.write(given, store.codecs, moves)
        return table, given
