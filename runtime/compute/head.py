"""The language-model head: logits, and what policies ask of them, some tokens at a time."""

from __future__ import annotations

import math

import numpy as np

from kvq.runtime.compute.binding import Bound, NamedSession
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.logits import usable
from kvq.runtime.errors import BundleError

# Rows of logits computed at a time: a long prompt must not materialise [tokens, vocab] floats.
HEAD_ROWS = 32
SLACK = 0.1  # of what rounding may add to an entropy or a confidence: their sums have as many terms as there are ids


class Head:
    """Buffers and bindings of the language-model head, up to `rows` tokens at a time.

    Args:
        engine: the sessions.
        rows: most tokens at a time.
        head: the head's session; None takes the one that runs everywhere.
    """

    def __init__(self, engine: Engine, rows: int, head: NamedSession | None = None) -> None:
        shape = engine.architecture
        self._residual = np.zeros((rows, shape.hidden), np.float32)
        self._logits = np.zeros((rows, shape.vocab), np.float32)
        self._entropy = np.zeros(rows, np.float32)
        self._confidence = np.zeros(rows, np.float32)
        self._head, self._uncertainty = head or engine.head(), engine.uncertainty
        self._most = math.log(shape.vocab) + SLACK  # of an entropy
        self._heads: dict[int, Bound] = {}
        self._uncertainties: dict[int, Bound] = {}

    def logits(self, residual: np.ndarray) -> np.ndarray:
        """Logits of residual [n <= rows, hidden], float32 [n, vocab]: a view, overwritten by the next call."""
        rows = len(residual)
        self._residual[:rows] = residual
        if rows not in self._heads:
            inputs, outputs = {"residual": self._residual[:rows]}, {"logits": self._logits[:rows]}
            self._heads[rows] = Bound(self._head, inputs, outputs)
        self._heads[rows].run()
        return self._logits[:rows]

    def usable(self, rows: int) -> bool:
        """Whether the first rows of the last `logits` are `usable`."""
        return usable(self._logits[:rows])

    def uncertainty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Entropy (nats) and max probability of the first rows of the last `logits`, float32 [rows] views.

        Raises:
            BundleError: the graph gives of usable logits what no distribution has.
        """
        if rows not in self._uncertainties:
            outputs = {"entropy": self._entropy[:rows], "confidence": self._confidence[:rows]}
            self._uncertainties[rows] = Bound(self._uncertainty, {"logits": self._logits[:rows]}, outputs)
        self._uncertainties[rows].run()
        entropy, confidence = self._entropy[:rows], self._confidence[:rows]
        for found, most in ((entropy, self._most), (confidence, 1 + SLACK)):
            # Policies, pictures and JSON would have to bear it otherwise. Of NaN either comparison is false.
            if not (found.min() >= -SLACK and found.max() <= most) and self.usable(rows):
                raise BundleError(
                    f"{self._uncertainty.name} gives an entropy or a probability that there is not; export the bundle"
                    " again"
                )
        return entropy, confidence
