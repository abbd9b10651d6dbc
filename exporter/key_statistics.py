"""What attention reads of keys beyond the recent window, and with which queries: measured on a calibration text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvq.exporter.calibration import check_finite, windows
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.passes import SegmentedPass
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.key_turns import BLOCK, middle

TEXT = 512  # tokens that are read on their own: time grows with their square
SINK, RECENT = 4, 16  # of a session's defaults: tokens that are read exactly need no better basis


# see(kv_head, queries [heads of it, tokens, head_dim], keys [tokens, head_dim], weights [heads of it, tokens, tokens])
See = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]


def causal_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    out: np.ndarray,
    see: See | None = None,
    window: int = 0,
) -> None:
    """Attention of a whole text over itself, KV head by KV head, and what `see` wants to see of it.

    Args:
        query: float32 [tokens, heads, head_dim].
        key, value: float32 [tokens, kv_heads, head_dim].
        out: float32 [tokens, heads, head_dim], written.
        see: may change the weights it is given.
        window: newest tokens that each sees, itself included; 0: all.
    """
    tokens, heads, head_dim = query.shape
    kv_heads, hidden = key.shape[1], np.triu(np.ones((tokens, tokens), bool), 1)
    if window:
        hidden |= np.tri(tokens, k=-window, dtype=bool)
    for h in range(kv_heads):
        group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
        q, k = query[:, group].transpose(1, 0, 2), key[:, h]
        weights = q @ k.T * np.float32(head_dim**-0.5)
        np.copyto(weights, -np.inf, where=hidden)
        np.exp(weights - weights.max(-1, keepdims=True), out=weights)
        weights /= weights.sum(-1, keepdims=True)
        out[:, group] = (weights @ value[:, h]).transpose(1, 0, 2)
        if see is not None:
            see(h, q, k, weights)


class KeyStatistics:
    """Sums over the attention that a calibration text pays beyond window and sinks.

    Attributes:
        queries, keys: float64 [layers, kv_heads, head_dim, head_dim], second moments weighted by attention.
        key_sums: float64 [layers, kv_heads, head_dim].
        weight: float64 [layers, kv_heads], attention in all.
        plain: float64 [layers, kv_heads, head_dim], sum of all keys but each window's first; `count` of them.
        frequencies: float64 [layers, head_dim // 2], of the rotary embedding; 0 where there is none. They make waves, a
            cosine and a sine of each, of the middle of a position's block; of these, as of the keys,
        waves: float64 [layers, kv_heads, head_dim, head_dim], second moments weighted by attention,
        wave_keys: the same of waves and keys,
        wave_sums: float64 [layers, kv_heads, head_dim], and
        plain_waves: float64 [layers, head_dim], sums over what `plain` sums.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, frequencies: np.ndarray | None = None) -> None:
        self.queries, self.keys = np.zeros((2, layers, kv_heads, head_dim, head_dim))
        self.key_sums, self.plain = np.zeros((2, layers, kv_heads, head_dim))
        self.weight = np.zeros((layers, kv_heads))
        self.count = 0
        self.frequencies = np.zeros((layers, head_dim // 2)) if frequencies is None else frequencies
        self.waves, self.wave_keys = np.zeros((2, layers, kv_heads, head_dim, head_dim))
        self.wave_sums = np.zeros((layers, kv_heads, head_dim))
        self.plain_waves = np.zeros((layers, head_dim))

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
        """Causal attention of a whole text over itself, as `AttentionBackend.attend`; the store is empty."""
        places = np.arange(len(query))
        near = (places < SINK) | (places[:, None] - places <= RECENT)
        angles = self.frequencies[layer][:, None] * middle(places // BLOCK)
        waves = np.stack([np.cos(angles), np.sin(angles)], axis=1).reshape(-1, len(query)).astype(np.float32)
        self.plain_waves[layer] += waves[:, 1:].sum(1, dtype=np.float64)

        def count(h: int, q: np.ndarray, k: np.ndarray, weights: np.ndarray) -> None:
            np.copyto(weights, 0, where=near)
            spent, received = weights.sum(-1), weights.sum((0, 1))
            rows = q.reshape(-1, q.shape[-1])
            self.queries[layer, h] += (rows * spent.reshape(-1, 1)).T @ rows
            self.keys[layer, h] += (k * received[:, None]).T @ k
            self.key_sums[layer, h] += received @ k
            self.weight[layer, h] += received.sum()
            self.plain[layer, h] += k[1:].sum(0, dtype=np.float64)
            weighted = waves * received
            self.waves[layer, h] += weighted @ waves.T
            self.wave_keys[layer, h] += weighted @ k
            self.wave_sums[layer, h] += weighted.sum(1)

        windows = store.geometry.windows
        causal_attention(query, key, value, out, count, windows[layer] if windows else 0)


def key_statistics(
    bundle: Bundle,
    ids: np.ndarray,
    frequencies: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> KeyStatistics:
    """Statistics of a text, by the runtime's own passes.

    Args:
        bundle: the model, its keys neither centred nor in a basis yet.
        ids: int64 [tokens] of a calibration text.
        frequencies: see `KeyStatistics`; None measures no waves.
        progress: called with the tokens done and all there are.

    Raises:
        CalibrationError: keys or queries that are no finite numbers.
    """
    shape, engine = bundle.manifest.architecture, Engine(bundle)
    found = KeyStatistics(shape.layers, shape.kv_heads, shape.head_dim, frequencies)
    for start, part in windows(ids, min(TEXT, shape.context)):
        store = KVStore(shape.geometry, recent=0)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused below
            SegmentedPass(engine, len(part), found.attend).forward(part, store)
        found.count += len(part) - 1
        if progress is not None:
            progress(start + len(part), len(ids))
    check_finite("keys and queries", found.keys, found.queries, found.key_sums, found.plain, found.wave_keys)
    return found
