"""A joint pass as one graph: its attention operator is given the stores of all sessions as a chain of passes."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import numpy as np

from kvq.runtime.compute.backends.native_pass import run_graph
from kvq.runtime.compute.backends.native_span import NativeSpan
from kvq.runtime.compute.binding import Bound
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.joint import JointPass, Span
from kvq.runtime.native.library import FILE


class NativeJointPass(JointPass):
    """One run of the decoder graph over the rows of several sessions, whose backends are all `NativeAttention`.

    Args:
        engine: the sessions.
        kernel: index of the instruction set, see `library.kernels`.
    """

    def __init__(self, engine: Engine, kernel: int) -> None:
        super().__init__(engine)
        self._kernel = kernel
        self._room(1)

    def _room(self, rows: int) -> None:
        """Buffers for so many rows; graphs are bound to the first ones of them."""
        self._ids, self._positions = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._residual = np.zeros((rows, self.engine.architecture.hidden), np.float32)
        self._graphs: dict[int, Bound] = {}

    def _graph(self, rows: int) -> Bound:
        if rows > len(self._ids):
            self._room(rows)
        if rows not in self._graphs:
            inputs = {"ids": self._ids[:rows], "positions": self._positions[:rows]}
            named = self.engine.decoder(FILE, self._kernel)
            self._graphs[rows] = Bound(named, inputs, {"residual_out": self._residual[:rows]})
        return self._graphs[rows]

    def takes(self, span: Span) -> bool:
        return not self._of(span).update(span.store, span.squares)

    def _of(self, span: Span) -> NativeSpan:
        found: NativeSpan = span.backend.span(self.engine, len(span.ids), span.stepwise)  # type: ignore[attr-defined]
        return found

    def forward(self, spans: Sequence[Span]) -> np.ndarray:
        graph, at = self._graph(sum(len(span.ids) for span in spans)), 0
        given = [self._of(span) for span in spans]
        for span, own in zip(spans, given, strict=True):
            stop = at + len(span.ids)
            self._ids[at:stop] = span.ids
            self._positions[at:stop] = span.positions
            span.keys, span.values = own.keys, own.values
            at = stop
        for one, following in itertools.pairwise(given):
            one.given.next = ctypes.addressof(following.given)
        given[-1].given.next = None
        run_graph(graph, given[0].given)
        return self._residual[:at]
