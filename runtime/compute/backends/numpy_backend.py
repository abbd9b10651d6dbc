"""The numpy backend: the specification of attention over the store, and the fallback."""

from __future__ import annotations

import numpy as np

from kvq.runtime.compute.backends.base import AttentionBackend
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import CodecSet

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


class _Rows:
    """Attention rows of new tokens, to which what they see is added part by part.

    Rows are (query head of the group, token): one matrix product per KV head.
    """

    def __init__(self, query: np.ndarray, kv_heads: int) -> None:
        tokens, heads, head_dim = query.shape
        self.shape = (kv_heads, heads // kv_heads, tokens)
        scaled = (query * np.float32(head_dim**-0.5)).reshape(tokens, *self.shape[:2], head_dim)
        self.query = scaled.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        self.softmax = PartialSoftmax(*self.query.shape)

    def add(self, keys: np.ndarray, values: np.ndarray, sees: np.ndarray | None = None) -> None:
        """Keys, values [kv_heads, n, head_dim]; sees: bool [tokens, n], None: every token sees all."""
        scores = self.query @ keys.transpose(0, 2, 1)
        if sees is not None and not sees.all():
            np.copyto(scores, -np.inf, where=~np.tile(sees, (self.shape[1], 1)))
        self.softmax.add(scores, values)

    def finish(self, out: np.ndarray, row_squares: np.ndarray | None) -> None:
        """Write out [tokens, heads, head_dim] and row_squares [tokens, heads]."""
        softmax, (kv_heads, group, tokens) = self.softmax, self.shape

        def by_token(x: np.ndarray) -> np.ndarray:
            return x.reshape(kv_heads, group, tokens, -1).transpose(2, 0, 1, 3).reshape(tokens, kv_heads * group, -1)

        out[...] = by_token(softmax.weighted / softmax.total)
        if row_squares is not None:
            row_squares[...] = by_token(softmax.squares / softmax.total**2)[..., 0]


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
        tokens = len(query)
        # The new tokens first: each sees at least itself, so the running maximum is finite.
        rows = _Rows(query, key.shape[1])
        place = store.length + np.arange(tokens)
        causal = _and(np.tri(tokens, dtype=bool), _near(store, layer, place, place))
        rows.add(key.transpose(1, 0, 2), value.transpose(1, 0, 2), causal)
        for keys, values, column in store.placed_blocks(layer, BLOCK, self._room(store)):
            rows.add(keys, values, _near(store, layer, place, column))
        rows.finish(out, row_squares)

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
        tokens, window = len(query), store.window
        new = [x.transpose(1, 0, 2) for x in (key, value)]
        rows = _Rows(query, key.shape[1])
        rows.add(new[0], new[1], np.eye(tokens, dtype=bool))  # itself, unrounded
        first = store.length - window.count
        slots = window.slots(first, store.length)
        held = window.read(slots, layer)
        kept = [np.concatenate([old, window.keys.codec.roundtrip(x)], axis=1) for old, x in zip(held, new, strict=True)]
        place = store.length + np.arange(tokens)[:, None]
        column = first + np.arange(kept[0].shape[1])
        near = place - column <= window.capacity
        seen = _near(store, layer, place[:, 0], column)
        rows.add(kept[0], kept[1], _and(near & (column < place), seen))
        gone = np.flatnonzero(~near[-1])  # from the window by the time of the last new token
        if len(gone):
            due = store.geometry.in_layer(store.due(), layer)
            parts = zip(held, due.T, (layer, None), strict=True)
            stored = [_as_stored(store.codecs, x[:, gone], ids[gone], of, column[gone]) for x, ids, of in parts]
            rows.add(stored[0], stored[1], _and(~near, seen)[:, gone])
        for keys, values, places in store.placed_blocks(layer, BLOCK, self._room(store), recent=False):
            rows.add(keys, values, _near(store, layer, place[:, 0], places))
        rows.finish(out, row_squares)

    def _room(self, store: KVStore) -> np.ndarray:
        """Scratch to decode blocks into."""
        needed = store.geometry.kv_heads * min(BLOCK, store.length) * store.geometry.head_dim
        if self._scratch.shape[1] < needed:  # grows by doubling, so that most steps allocate nothing here
            most = store.geometry.kv_heads * BLOCK * store.geometry.head_dim
            self._scratch = np.empty((2, min(2 * needed, most)), np.float32)
        return self._scratch


def _near(store: KVStore, layer: int, places: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
    """Whether tokens at places [n] see those at others [m] through the layer's window: bool [n, m]; None: all do."""
    windows = store.geometry.windows
    if not windows or not windows[layer]:
        return None
    return places[:, None] - columns < windows[layer]


def _and(sees: np.ndarray, near: np.ndarray | None) -> np.ndarray:
    return sees if near is None else sees & near


def _as_stored(
    codecs: CodecSet, x: np.ndarray, ids: np.ndarray, layer: int | None, positions: np.ndarray
) -> np.ndarray:
    """Vectors [kv_heads, tokens, head_dim] as they are read once they are stored, each token at its precision.

    layer: whose keys they are; None for values. positions: [tokens].
    """
    stored = np.empty_like(x)
    for precision in np.unique(ids):
        chosen = np.flatnonzero(ids == precision)
        stored[:, chosen] = codecs.reread(int(precision), np.ascontiguousarray(x[:, chosen]), layer, positions[chosen])
    return stored


BACKENDS = {"numpy": NumpyAttention}
