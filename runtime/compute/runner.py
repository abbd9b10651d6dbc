"""The runner: what one session runs the model with, passes and head of a few sizes, kept from step to step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import HEAD_ROWS, Head
from kvq.runtime.compute.logits import not_usable
from kvq.runtime.compute.passes import ForwardPass
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.features import Seen

if TYPE_CHECKING:
    from kvq.runtime.compute.backends.base import AttentionBackend


class Timer(Protocol):
    """Told what a step is busy with: a context for the part of that name."""

    def __call__(self, part: str) -> AbstractContextManager[None]: ...


class Runner:
    """Runs the tokens of one session through the model.

    Args:
        backend: makes passes and head.
        engine: the model's graphs.
        most: tokens of a whole chunk; passes of one token and of so many are kept, others made anew.
        stepwise: each token of a pass sees what it would see if it came alone, see docs/stepwise.md.

    Attributes:
        timer: told what takes time; None, as it is at first, costs nothing.
    """

    def __init__(self, backend: AttentionBackend, engine: Engine, most: int, stepwise: bool) -> None:
        self.timer: Timer | None = None
        self._backend, self._engine = backend, engine
        self._most, self._stepwise = most, stepwise
        self._passes: dict[int, ForwardPass] = {}
        self._heads: dict[int, Head] = {}

    def run(self, ids: np.ndarray, store: KVStore, needs: frozenset[str], skip: int, logits: np.ndarray) -> Seen:
        """One pass over ids int64 [tokens], which follow on the store; the store is not changed.

        Args:
            needs: of `FEATURE_NAMES`, what to compute besides.
            skip: logits of the first so many tokens are not asked for.
            logits: float32 [tokens - skip, vocab], written.

        Raises:
            NonFiniteError: logits that went through the head are not all `usable`.
        """
        layers = self._forward_pass(len(ids))
        squares = None
        if "attention_variance" in needs:
            squares = np.empty((len(ids), self._engine.architecture.heads), np.float32)
        layers.forward(ids, store, squares)
        both = None
        if needs & {"entropy", "confidence"}:
            both = np.empty((2, len(ids)), np.float32)
        self._through_head(layers.residual, skip, logits, both)
        entropy, confidence = (None, None) if both is None else both
        return Seen(ids, layers.residual, layers.keys, layers.values, squares, entropy, confidence)

    def _through_head(self, residual: np.ndarray, skip: int, out: np.ndarray, both: np.ndarray | None) -> None:
        """Logits of residual[skip:] to out; entropy and confidence of all rows to both, float32 [2, tokens], if given.

        Rows before `skip` go through the head only for these.
        """
        for at in range(skip if both is None else 0, len(residual), HEAD_ROWS):
            rows = residual[at : at + HEAD_ROWS]
            stop, head = at + len(rows), self._head(len(rows))
            logits = head.logits(rows)
            if both is not None:
                if self.timer is None:
                    both[:, at:stop] = head.uncertainty(len(rows))
                else:
                    with self.timer("uncertainty"):
                        both[:, at:stop] = head.uncertainty(len(rows))
            if stop > skip:
                out[max(at, skip) - skip : stop - skip] = logits[max(skip - at, 0) :]
            if not head.usable(len(rows)):
                raise not_usable()

    def _forward_pass(self, tokens: int) -> ForwardPass:
        if tokens in self._passes:
            return self._passes[tokens]
        forward_pass = self._backend.forward_pass(self._engine, tokens, self._stepwise)
        if tokens in (1, self._most):
            self._passes[tokens] = forward_pass
        return forward_pass

    def _head(self, rows: int) -> Head:
        """Head buffers for that many rows: one, or up to `HEAD_ROWS`."""
        size = 1 if rows == 1 else min(self._most, HEAD_ROWS)
        if size not in self._heads:
            self._heads[size] = self._backend.head(self._engine, size)
        return self._heads[size]
