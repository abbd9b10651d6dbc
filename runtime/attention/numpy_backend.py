"""The numpy backend: the specification of attention over the store, and the fallback."""

from __future__ import annotations

import numpy as np

from kvq.runtime.attention.base import AttentionBackend
from kvq.runtime.store import KVStore

# Tokens decoded at a time: scratch is two arrays of kv_heads * BLOCK * head_dim floats, and the
# score matrix stays in cache, however long the context.
BLOCK = 1024


class PartialSoftmax:
    """Running softmax-weighted sum over blocks of keys (flash-decoding's merge).

    Shapes: maximum, total, squares float32 [kv_heads, rows, 1]; weighted [kv_heads, rows, head_dim].
    """

    def __init__(self, kv_heads: int, rows: int, head_dim: int) -> None:
        self.maximum = np.full((kv_heads, rows, 1), -np.inf, np.float32)
        self.total = np.zeros((kv_heads, rows, 1), np.float32)
        self.squares = np.zeros((kv_heads, rows, 1), np.float32)
        self.weighted = np.zeros((kv_heads, rows, head_dim), np.float32)

    def add(self, scores: np.ndarray, values: np.ndarray) -> None:
        """Merge scores [kv_heads, rows, n] (overwritten) over values [kv_heads, n, head_dim].

        Every row of the first block added must have a finite score.
        """
        maximum = np.maximum(self.maximum, scores.max(axis=-1, keepdims=True))
        keep = np.exp(self.maximum - maximum)
        np.exp(np.subtract(scores, maximum, out=scores), out=scores)
        self.total = self.total * keep + scores.sum(axis=-1, keepdims=True)
        self.squares = self.squares * keep**2 + np.einsum("hrn,hrn->hr", scores, scores)[..., None]
        self.weighted = self.weighted * keep + scores @ values
        self.maximum = maximum


class NumpyAttention(AttentionBackend):
    """Decodes each block of the store to float32 and merges partial softmax results."""

    name = "numpy"
    priority = 0

    def __init__(self) -> None:
        self._scratch = np.empty((2, 0), np.float32)

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
        tokens, heads, head_dim = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        # Rows are (query head of the group, token): one matrix product per KV head.
        scaled = query * np.float32(head_dim**-0.5)
        rows = scaled.reshape(tokens, kv_heads, group, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        softmax = PartialSoftmax(kv_heads, group * tokens, head_dim)

        # The new tokens first: each sees at least itself, so the running maximum is finite.
        scores = rows @ key.transpose(1, 2, 0)
        if tokens > 1:
            future = np.triu(np.ones((tokens, tokens), bool), 1)
            np.copyto(scores, -np.inf, where=np.tile(future, (group, 1)))
        softmax.add(scores, value.transpose(1, 0, 2))
        needed = kv_heads * min(BLOCK, store.length) * head_dim
        if self._scratch.shape[1] < needed:  # grows by doubling, so that most steps allocate nothing here
            self._scratch = np.empty((2, min(2 * needed, kv_heads * BLOCK * head_dim)), np.float32)
        for keys, values in store.blocks(layer, BLOCK, self._scratch):
            softmax.add(rows @ keys.transpose(0, 2, 1), values)

        def by_token(x: np.ndarray) -> np.ndarray:
            return x.reshape(kv_heads, group, tokens, -1).transpose(2, 0, 1, 3).reshape(tokens, heads, -1)

        out[...] = by_token(softmax.weighted / softmax.total)
        if row_squares is not None:
            row_squares[...] = by_token(softmax.squares / softmax.total**2)[..., 0]


BACKENDS = {"numpy": NumpyAttention}
