"""The native backend: attention over the packed codes in C, see ``runtime/native``."""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.compute.backends.base import AttentionBackend
from kvq.runtime.compute.backends.native_joint import NativeJointPass
from kvq.runtime.compute.backends.native_pass import NativeHead, NativePass
from kvq.runtime.compute.backends.native_span import NativeSpan
from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import Head
from kvq.runtime.compute.joint import JointPass
from kvq.runtime.compute.passes import ForwardPass
from kvq.runtime.errors import BackendError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native.codecs import native_codecs
from kvq.runtime.native.library import Pass, Rows, check, choose_kernel, kernels, load
from kvq.runtime.native.stepwise import StepwiseTable
from kvq.runtime.native.table import PageTable
from kvq.runtime.native.turns import TurnsTable
from kvq.runtime.precision.table import Pair


class NativeAttention(AttentionBackend):
    """Reads the codes as they lie in the pages, with the best instructions this machine has.

    What the library has no kernels for is numpy's: while a store holds such pages, the numpy backend attends, and
    `detail` says so from then on. The environment variable KVQ_NATIVE_ISA names a lesser instruction set, for tests.
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
        self.rows_alike = True
        self._library = load()
        self.detail, self._kernel = choose_kernel()
        self._table = PageTable()
        self._stepwise = StepwiseTable(self._kernel)
        self._windows = np.zeros(0, np.int32)
        self._turns = TurnsTable()
        self._spans: dict[tuple[int, bool], NativeSpan] = {}
        self._numpy: NumpyAttention | None = None
        self._foreign: dict[Pair, None] = {}
        self.codecs = native_codecs(self._kernel)

    def stand_in(self, foreign: list[Pair]) -> NumpyAttention:
        """The numpy backend, for a store with these pairs that the library has no kernels for."""
        self.rows_alike = False
        if self._numpy is None:
            self._numpy = NumpyAttention()
        if not self._foreign.keys() >= set(foreign):
            said = self._numpy_said()
            self._foreign |= dict.fromkeys(foreign)
            self.detail = self.detail.removesuffix(said) + self._numpy_said()
        return self._numpy

    def _numpy_said(self) -> str:
        """What `detail` says of what numpy has done."""
        return f"; numpy for {', '.join(map(str, self._foreign))}, which it has no kernels for" if self._foreign else ""

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
        self._table.update(store)
        if self._table.foreign:
            self.stand_in(self._table.foreign).attend(query, key, value, store, layer, out, row_squares)
            return
        forward = self._pass_of(query, key, store, self._table)
        self._attend(forward, (query, key, value), layer, out, row_squares)

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
        if len(query) < 2:
            self.attend(query, key, value, store, layer, out, row_squares)
            return
        copies = np.empty((2, store.geometry.layers, key.shape[1], len(key), key.shape[2]), np.float32)
        table, move = self._stepwise.update(store, *copies)
        if table.foreign:
            self.stand_in(table.foreign).attend_stepwise(query, key, value, store, layer, out, row_squares)
            return
        forward = self._pass_of(query, key, store, table)
        forward.keys, forward.values = (x.ctypes.data for x in copies)
        forward.stepwise = ctypes.addressof(move)
        self._attend(forward, (query, key, value), layer, out, row_squares)

    def _pass_of(self, query: np.ndarray, key: np.ndarray, store: KVStore, table: PageTable) -> Pass:
        tokens, heads, head_dim = query.shape
        shape = (store.geometry.layers, heads, key.shape[1], head_dim)
        forward = Pass(*shape, tokens, len(table.rows), self._kernel, 1, table.address, position=store.length)
        self._windows = np.array(store.geometry.windows, np.int32)
        forward.turns = self._turns.address(store.codecs.turns, store.length + tokens)
        if len(self._windows):
            forward.windows = self._windows.ctypes.data
        return forward

    def _attend(
        self, forward: Pass, new: tuple[np.ndarray, ...], layer: int, out: np.ndarray, row_squares: np.ndarray | None
    ) -> None:
        """Write out and row_squares of one layer; new: query, key, value."""
        rows = [np.ascontiguousarray(x, np.float32) for x in new]
        result, squares = np.empty(rows[0].shape, np.float32), np.empty(rows[0].shape[:2], np.float32)
        strides = [x.strides[0] // x.itemsize for x in rows]
        given = Rows(*(x.ctypes.data for x in (*rows, result)), *strides, squares.ctypes.data)
        check(self._library.kvq_attend(ctypes.byref(forward), layer, ctypes.byref(given), None, None))
        out[...] = result
        if row_squares is not None:
            row_squares[...] = squares

    def forward_pass(self, engine: Engine, tokens: int, stepwise: bool = False) -> ForwardPass:
        return NativePass(engine, tokens, self._kernel, stepwise, self.stand_in)

    @property
    def joins(self) -> tuple[str, int]:
        return self.name, self._kernel

    def joint_pass(self, engine: Engine) -> JointPass:
        return NativeJointPass(engine, self._kernel)

    def span(self, engine: Engine, tokens: int, stepwise: bool) -> NativeSpan:
        """What a joint pass needs of the session's; that of one token is kept, and the last one of more."""
        key = (tokens, stepwise)
        if key not in self._spans:
            self._spans = {kept: span for kept, span in self._spans.items() if kept[0] == 1}
            self._spans[key] = NativeSpan(engine, tokens, self._kernel, stepwise)
        return self._spans[key]

    def head(self, engine: Engine, rows: int) -> Head:
        return NativeHead(engine, rows, self._kernel)


BACKENDS = {"native": NativeAttention}
