"""Forward passes: all layers over a fixed number of tokens, with every buffer bound once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from kvq.runtime.bundle.forms import ANGLES
from kvq.runtime.compute.binding import Bound
from kvq.runtime.compute.engine import Engine
from kvq.runtime.kv.store import KVStore
from kvq.runtime.machine.blas import one_thread


class ForwardPass(ABC):
    """All layers over a fixed number of tokens, with buffers bound once.

    One forward pass serves one thread at a time. A new one binds to the engine's graphs and
    raises BundleError where they do not fit the manifest.

    Attributes:
        tokens: new tokens of a pass.
        keys, values: float32 [layers, kv_heads, tokens, head_dim], those of the new tokens after `forward`.
        residual: float32 [tokens, hidden] after `forward`, what `Head` takes.
    """

    def __init__(self, engine: Engine, tokens: int) -> None:
        shape = engine.architecture
        self.engine = engine
        self.tokens = tokens
        self.ids = np.zeros(tokens, np.int64)
        self.positions = np.zeros(tokens, np.int64)
        self._places = np.arange(tokens)
        self.keys = np.zeros((shape.layers, shape.kv_heads, tokens, shape.head_dim), np.float32)
        self.values = np.zeros((shape.layers, shape.kv_heads, tokens, shape.head_dim), np.float32)
        self.residual = np.zeros((tokens, shape.hidden), np.float32)

    def forward(self, ids: np.ndarray, store: KVStore, row_squares: np.ndarray | None = None) -> None:
        """Run all layers over ids int64 [tokens] that follow on the store; the store is not changed.

        row_squares: float32 [tokens, heads], written when given: sums of squares of the last layer's attention rows.
        """
        self.ids[:] = ids
        self.positions.fill(store.length)
        if self.tokens > 1:
            self.positions += self._places
        self._run(store, row_squares)

    def forward_at(self, ids: np.ndarray, positions: np.ndarray, store: KVStore) -> None:
        """`forward`, but ids stand at positions int64 [tokens], whatever the store holds."""
        self.ids[:], self.positions[:] = ids, positions
        self._run(store, None)

    @abstractmethod
    def _run(self, store: KVStore, row_squares: np.ndarray | None) -> None:
        """Run over `ids` at `positions`; fill keys, values and residual."""


# attend(query, key, value, store, layer, out, row_squares), see `AttentionBackend.attend`.
Attend = Callable[[np.ndarray, np.ndarray, np.ndarray, KVStore, int, np.ndarray, np.ndarray | None], None]


class SegmentedPass(ForwardPass):
    """Segment by segment, with attention between them in Python."""

    def __init__(self, engine: Engine, tokens: int, attend: Attend) -> None:
        super().__init__(engine, tokens)
        self._attend = attend
        shape = engine.architecture
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self._query_key = np.zeros((tokens, heads + kv_heads, head_dim), np.float32)
        self._value = np.zeros((tokens, kv_heads, head_dim), np.float32)
        self._attention = np.zeros((tokens, heads, head_dim), np.float32)
        names = {name for pair in ANGLES for name in pair} & engine.segments[0].outputs
        angles = {name: np.zeros((tokens, head_dim // 2), np.float32) for name in sorted(names)}
        flat_attention = self._attention.reshape(tokens, -1)
        # The last segment, number `layers`, writes into `residual`.
        residual = [self.residual, np.zeros((tokens, shape.hidden), np.float32)]

        self._segments = []
        for i, session in enumerate(engine.segments):
            inputs: dict[str, np.ndarray] = {"ids": self.ids, "positions": self.positions}
            outputs: dict[str, np.ndarray] = {"residual_out": residual[(shape.layers - i) % 2]}
            if i > 0:
                inputs = {"residual": residual[(shape.layers - i + 1) % 2], "attention": flat_attention}
            if i == 0:
                outputs |= angles
            else:
                inputs |= {name: array for name, array in angles.items() if name in session.inputs}
            if i < shape.layers:
                outputs |= {"query_key": self._query_key, "value": self._value}
            self._segments.append(Bound(session, inputs, outputs))

    def _run(self, store: KVStore, row_squares: np.ndarray | None) -> None:
        shape = self.engine.architecture
        query, key = self._query_key[:, : shape.heads], self._query_key[:, shape.heads :]
        # A single token's products are too small for BLAS to start threads.
        # What overflows is no number then, which is found where keys, values and logits are looked at.
        quiet = np.errstate(over="ignore", invalid="ignore")
        with quiet, one_thread() if self.tokens > 1 else nullcontext():
            for layer, segment in enumerate(self._segments):
                segment.run()
                if layer < shape.layers:
                    self.keys[layer] = key.transpose(1, 0, 2)
                    self.values[layer] = self._value.transpose(1, 0, 2)
                    squares = row_squares if layer == shape.layers - 1 else None
                    self._attend(query, key, self._value, store, layer, self._attention, squares)
