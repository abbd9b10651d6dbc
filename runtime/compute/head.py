"""The language-model head: logits, and what policies ask of them, some tokens at a time."""

from __future__ import annotations

import numpy as np

from kvq.runtime.compute.binding import Bound, NamedSession
from kvq.runtime.compute.engine import Engine

# Rows of logits computed at a time: a long prompt must not materialise [tokens, vocab] floats.
HEAD_ROWS = 32


class Head:
    """Buffers and bindings of the language-model head, `rows` tokens at a time.

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
        self._head = Bound(head or engine.head(), {"residual": self._residual}, {"logits": self._logits})
        self._uncertainty = Bound(
            engine.uncertainty, {"logits": self._logits}, {"entropy": self._entropy, "confidence": self._confidence}
        )

    def logits(self, residual: np.ndarray) -> np.ndarray:
        """Logits of residual [n <= rows, hidden], float32 [n, vocab]: a view, overwritten by the next call."""
        self._residual[: len(residual)] = residual
        self._head.run()
        return self._logits[: len(residual)]

    def finite(self, rows: int) -> bool:
        """Whether the first rows of the last `logits` are finite numbers."""
        return bool(np.isfinite(self._logits[:rows]).all())

    def uncertainty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Entropy (nats) and max probability of the first rows of the last `logits`, float32 [rows] views."""
        self._uncertainty.run()
        return self._entropy[:rows], self._confidence[:rows]
