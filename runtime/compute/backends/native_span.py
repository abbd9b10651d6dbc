"""What one session has of a native forward pass: its page table, and its new keys and values."""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.compute.engine import Engine
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native.library import Pass
from kvq.runtime.native.stepwise import StepwiseTable
from kvq.runtime.native.table import PageTable
from kvq.runtime.native.turns import TurnsTable
from kvq.runtime.precision.table import Pair


class NativeSpan:
    """A `Pass` for a fixed number of new tokens of one session, kept up to date from step to step.

    Args:
        engine: the sessions.
        tokens: new ones.
        kernel: index of the instruction set, see `library.kernels`.
        stepwise: as in `AttentionBackend.forward_pass`.

    Attributes:
        keys, values: float32 [layers, kv_heads, tokens, head_dim], those of the new tokens after the pass.
        given: what the library is handed.
    """

    def __init__(self, engine: Engine, tokens: int, kernel: int, stepwise: bool) -> None:
        shape = engine.architecture
        self.keys = np.zeros((shape.layers, shape.kv_heads, tokens, shape.head_dim), np.float32)
        self.values = np.zeros_like(self.keys)
        self._table = PageTable(settles=tokens == 1)
        self._stepwise = StepwiseTable(kernel) if stepwise and tokens > 1 else None
        self.given = Pass(
            *(shape.layers, shape.heads, shape.kv_heads, shape.head_dim, tokens, 0, kernel, engine.threads, None),
            *(self.keys.ctypes.data, self.values.ctypes.data, None, None, None),
        )
        self._turns = TurnsTable()
        self._windows = np.array(shape.windows, np.int32)
        if shape.windows:
            self.given.windows = self._windows.ctypes.data

    def update(self, store: KVStore, row_squares: np.ndarray | None) -> list[Pair]:
        """Have `given` describe the store as it is now, until it changes.

        Returns:
            Pairs of its pages that the library has no kernels for; if there are any, another backend has to run.
        """
        table, given = self._table, self.given
        if self._stepwise is not None:
            table, move = self._stepwise.update(store, self.keys, self.values)
            given.stepwise = ctypes.addressof(move)
            self._move = move  # kept: `given` knows its address only
        else:
            table.update(store)
        given.page, given.pages, given.position = table.address, len(table.rows), store.length
        given.turns = self._turns.address(store.codecs.turns, store.length + given.tokens)
        given.row_squares = None if row_squares is None else row_squares.ctypes.data
        return table.foreign
