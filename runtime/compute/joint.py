"""Passes over the tokens of several sessions at once: products over all rows, attention over each one's store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.passes import SegmentedPass
from kvq.runtime.kv.store import KVStore

if TYPE_CHECKING:
    from kvq.runtime.compute.backends.base import AttentionBackend

MOST_KEPT = 4  # numbers of rows whose bound segments are kept


@dataclass(eq=False)
class Span:
    """What one session has of a joint pass.

    Attributes:
        backend: the session's own.
        ids: int64 [tokens], which follow on the store.
        store: it is not changed by a pass.
        stepwise: as in `AttentionBackend.forward_pass`.
        squares: float32 [tokens, heads], written when given: sums of squares of the last layer's attention rows.
        keys, values: float32 [layers, kv_heads, tokens, head_dim], of the new tokens after the pass; overwritten by
            the session's next one.
    """

    backend: AttentionBackend
    ids: np.ndarray
    store: KVStore
    stepwise: bool
    squares: np.ndarray | None
    keys: np.ndarray = field(init=False)
    values: np.ndarray = field(init=False)

    @property
    def positions(self) -> np.ndarray:
        """int64 [tokens]."""
        return np.arange(self.store.length, self.store.length + len(self.ids))


class JointPass(ABC):
    """All layers over the tokens of several sessions, each after its own text. One thread at a time.

    A row comes out as in a pass of the session's own where a row of the graphs' products does not depend on its
    neighbours, see docs/stepwise.md.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def takes(self, span: Span) -> bool:
        """Whether it can; asked just before `forward`, for every span of it."""
        return True

    @abstractmethod
    def forward(self, spans: Sequence[Span]) -> np.ndarray:
        """Run all layers over the tokens of all spans, one span after the other, and fill their keys and values.

        Returns:
            float32 [rows, hidden], what `Head` takes; overwritten by the next pass.
        """


class SegmentedJointPass(JointPass):
    """Segment by segment, with attention between them in Python, session after session: the specification."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._passes: dict[int, SegmentedPass] = {}
        self._spans: Sequence[Span] = ()

    def forward(self, spans: Sequence[Span]) -> np.ndarray:
        ids = np.concatenate([span.ids for span in spans])
        segments = self._passes.pop(len(ids), None) or SegmentedPass(self.engine, len(ids), self._attend)
        self._passes[len(ids)] = segments  # the newest last
        if len(self._passes) > MOST_KEPT:
            del self._passes[next(iter(self._passes))]
        self._spans = spans
        segments.forward_at(ids, np.concatenate([span.positions for span in spans]), spans[0].store)
        at = 0
        for span in spans:
            rows = slice(at, at + len(span.ids))
            span.keys, span.values = (np.ascontiguousarray(x[:, :, rows]) for x in (segments.keys, segments.values))
            at = rows.stop
        return segments.residual

    def _attend(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        store: KVStore,
        layer: int,
        out: np.ndarray,
        row_squares: np.ndarray | None = None,
    ) -> None:
        """An `Attend` of all rows; store and row_squares are the spans' own."""
        last, at = layer == self.engine.architecture.layers - 1, 0
        for span in self._spans:
            rows = slice(at, at + len(span.ids))
            attend = span.backend.attend_stepwise if span.stepwise else span.backend.attend
            squares = span.squares if last else None
            attend(query[rows], key[rows], value[rows], span.store, layer, out[rows], squares)
            at = rows.stop
