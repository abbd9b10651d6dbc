"""The native backend: attention over the packed codes in C, see ``runtime/native``."""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.compute.backends.base import AttentionBackend
from kvq.runtime.compute.backends.native_pass import NativeHead, NativePass
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import Head
from kvq.runtime.compute.passes import ForwardPass
from kvq.runtime.errors import BackendError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native.codecs import native_codecs
from kvq.runtime.native.library import Pass, Rows, choose_kernel, kernels, load
from kvq.runtime.native.stepwise import StepwiseTable
from kvq.runtime.native.table import PageTable


class NativeAttention(AttentionBackend):
    """Reads the codes as they lie in the pages, with the best instructions this machine has.

    The environment variable KVQ_NATIVE_ISA names a lesser instruction set, for tests.
    """

    name = "native"
    priority = 10

    @classmethod
    def unavailable(cls) -> str:
        try:
            kernels()
        except BackendError as error:
            return str(error)
        choose_kernel()  # a wrong KVQ_NATIVE_ISA is an error under auto too: somebody asked for it
        return ""

    def __init__(self) -> None:
        self._library = load()
        self.detail, self._kernel = choose_kernel()
        self._table = PageTable()
        self._stepwise = StepwiseTable(self._kernel)
        self.codecs = native_codecs(self._kernel)

    def attend(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        store: KVStore,
        layer: int,
        out: np.ndarray,
        row_squares: np.ndarray | None = None,
    ) -> None:
        self._attend(query, key, value, store, layer, out, row_squares, stepwise=False)

    def attend_stepwise(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        store: KVStore,
        layer: int,
        out: np.ndarray,
        row_squares: np.ndarray | None = None,
    ) -> None:
        self._attend(query, key, value, store, layer, out, row_squares, stepwise=len(query) > 1)

    def _attend(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, store: KVStore, layer: int, out: np.ndarray,
        row_squares: np.ndarray | None, stepwise: bool,
    ) -> None:  # fmt: skip
        tokens, heads, head_dim = query.shape
        rows = [np.ascontiguousarray(x, np.float32) for x in (query, key, value)]
        result = np.empty((tokens, heads, head_dim), np.float32)
        squares = np.empty((tokens, heads), np.float32)
        layers, kv_heads = store.geometry.layers, key.shape[1]
        forward = Pass(layers, heads, kv_heads, head_dim, tokens, 0, self._kernel, 1)
        if stepwise:
            copies = np.empty((2, layers, kv_heads, tokens, head_dim), np.float32)
            table, move = self._stepwise.update(store, *copies)
            forward.keys, forward.values = (x.ctypes.data for x in copies)
            forward.stepwise = ctypes.addressof(move)
        else:
            table = self._table
            table.update(store)
        forward.page, forward.pages = table.address, len(table.rows)
        strides = [x.strides[0] // x.itemsize for x in rows]
        new = Rows(*(x.ctypes.data for x in (*rows, result)), *strides, squares.ctypes.data)
        check(self._library.kvq_attend(ctypes.byref(forward), layer, ctypes.byref(new), None, None))
        out[...] = result
        if row_squares is not None:
            row_squares[...] = squares

    def forward_pass(self, engine: Engine, tokens: int, stepwise: bool = False) -> ForwardPass:
        return NativePass(engine, tokens, self._kernel, stepwise)

    def head(self, engine: Engine, rows: int) -> Head:
        return NativeHead(engine, rows, self._kernel)


def check(status: int) -> None:
    """Raise what a return value of kvq_attend stands for."""
    if status:
        raise MemoryError("no memory for attention: shorten the context or the prefill chunk")


BACKENDS = {"native": NativeAttention}
