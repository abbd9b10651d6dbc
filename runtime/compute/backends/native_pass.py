"""A forward pass as one graph, with attention as the native library's operator in it, and the head's check in C."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvq.runtime.compute.backends.base import AttentionBackend
from kvq.runtime.compute.backends.native_span import NativeSpan
from kvq.runtime.compute.binding import Bound
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import Head
from kvq.runtime.compute.logits import LARGEST_LOGIT
from kvq.runtime.compute.passes import ForwardPass
from kvq.runtime.errors import KvqError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native.library import FILE, Pass, check, error_of, load
from kvq.runtime.precision.table import Pair


class NativePass(ForwardPass):
    """One run of the decoder graph. The operator finds the session's store through `Pass`.

    Where the store holds pages that the library has no kernels for, or a stepwise pass would fill some, another backend
    runs the pass, with buffers of its own that are made the first time.

    Args:
        engine: the sessions.
        tokens: tokens per pass.
        kernel: index of the instruction set, see `library.kernels`.
        stepwise: as in `AttentionBackend.forward_pass`.
        stand_in: the other backend, for the pairs that are foreign to the library.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: int,
        kernel: int,
        stepwise: bool,
        stand_in: Callable[[list[Pair]], AttentionBackend],
    ) -> None:
        super().__init__(engine, tokens)
        self._asked_stepwise = stepwise
        self._span = NativeSpan(engine, tokens, kernel, stepwise)
        self.keys, self.values = self._span.keys, self._span.values
        self._stand_in = stand_in
        self._other: ForwardPass | None = None
        inputs, outputs = {"ids": self.ids, "positions": self.positions}, {"residual_out": self.residual}
        self._graph = Bound(engine.decoder(FILE, kernel), inputs, outputs)

    def _run(self, store: KVStore, row_squares: np.ndarray | None) -> None:
        foreign = self._span.update(store, row_squares)
        if foreign:
            self._run_other(self._stand_in(foreign), store, row_squares)
        else:
            run_graph(self._graph, self._span.given)

    def _run_other(self, backend: AttentionBackend, store: KVStore, row_squares: np.ndarray | None) -> None:
        if self._other is None:
            self._other = backend.forward_pass(self.engine, self.tokens, self._asked_stepwise)
        other = self._other
        other.forward(self.ids, store, row_squares)
        self.keys[...], self.values[...], self.residual[...] = other.keys, other.values, other.residual


def run_graph(graph: Bound, first: Pass) -> None:
    """Run a graph whose attention operators work on a pass, and on those behind it.

    Raises:
        KvqError, MemoryError: of the pass or the operator, see `library.error_of`, or of the graph.
    """
    library = load()
    check(library.kvq_set_pass(first))
    try:
        graph.run()
    except KvqError:  # the operator's errors come through onnxruntime, as others
        refused = library.kvq_set_pass(None)
        if refused:
            raise error_of(refused) from None
        raise
    finally:
        library.kvq_set_pass(None)


class NativeHead(Head):
    """The head, whose logits are looked at in one pass; what numpy needs for it is out of the caches by then.

    Args:
        engine, rows: as of `Head`.
        kernel: index of the instruction set, see `library.kernels`.
    """

    def __init__(self, engine: Engine, rows: int, kernel: int) -> None:
        super().__init__(engine, rows, engine.head(FILE, kernel))
        self._kernel, self._library = kernel, load()
        self._address, self._vocab = self._logits.ctypes.data, self._logits.shape[1]

    def usable(self, rows: int) -> bool:
        values = rows * self._vocab
        return bool(check(self._library.kvq_within(self._kernel, self._address, values, LARGEST_LOGIT)))
