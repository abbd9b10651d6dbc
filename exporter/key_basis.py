"""A basis of keys, per layer and KV head, in which their quantization hurts attention least.

Scores do not change when keys become A k and queries A^-T q. What does change is how an error of a code weighs: codes
of one scale spread their error evenly over the channels, so the channels should matter alike. With Sk the covariance of
the keys that are attended to and Sq that of the queries that attend to them, both beyond the recent window and the
sinks, the error of codes is least where tr(A Sk A^T) tr(A^-T Sq A^-1) is:

    A^T A = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2

That leaves a rotation free. The axes are turned to the principal ones of what keys and queries then share, and a
Hadamard matrix mixes these: every channel has the same variance, and a vector is close to Gaussian, as codes want it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvq.exporter.calibration import mean_of, windows
from kvq.exporter.rotation import head_rotation
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.passes import SegmentedPass
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry

SINK, RECENT = 4, 16  # of a session's defaults: tokens that are read exactly need no better basis
# Share of the mean variance added to all axes: a thousand tokens do not fill 64 of them.
DAMPING = 1.0


class KeyStatistics:
    """Sums over the attention that a calibration text pays beyond window and sinks.

    Attributes:
        queries, keys: float64 [layers, kv_heads, head_dim, head_dim], second moments weighted by attention.
        key_sums: float64 [layers, kv_heads, head_dim].
        weight: float64 [layers, kv_heads], attention in all.
        plain: float64 [layers, kv_heads, head_dim], sum of all keys but each window's first; `count` of them.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.queries, self.keys = np.zeros((2, layers, kv_heads, head_dim, head_dim))
        self.key_sums, self.plain = np.zeros((2, layers, kv_heads, head_dim))
        self.weight = np.zeros((layers, kv_heads))
        self.count = 0

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
        tokens, heads, head_dim = query.shape
        kv_heads, places = key.shape[1], np.arange(tokens)
        hidden = places > places[:, None]
        near = (places < SINK) | (places[:, None] - places <= RECENT)
        for h in range(kv_heads):
            group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
            q, k = query[:, group].transpose(1, 0, 2), key[:, h]
            scores = q @ k.T * np.float32(head_dim**-0.5)
            np.copyto(scores, -np.inf, where=hidden)
            np.exp(scores - scores.max(-1, keepdims=True), out=scores)
            scores /= scores.sum(-1, keepdims=True)
            out[:, group] = (scores @ value[:, h]).transpose(1, 0, 2)
            np.copyto(scores, 0, where=near | hidden)
            spent, received = scores.sum(-1), scores.sum((0, 1))
            rows = q.reshape(-1, head_dim)
            self.queries[layer, h] += (rows * spent.reshape(-1, 1)).T @ rows
            self.keys[layer, h] += (k * received[:, None]).T @ k
            self.key_sums[layer, h] += received @ k
            self.weight[layer, h] += received.sum()
            self.plain[layer, h] += k[1:].sum(0, dtype=np.float64)


def key_statistics(
    bundle: Bundle, ids: np.ndarray, progress: Callable[[int, int], None] | None = None
) -> KeyStatistics:
    """Statistics of a text, by the runtime's own passes.

    Args:
        bundle: the model, its keys neither centred nor in a basis yet.
        ids: int64 [tokens] of a calibration text.
        progress: called with the tokens done and all there are.
    """
    shape, engine = bundle.manifest.architecture, Engine(bundle)
    found = KeyStatistics(shape.layers, shape.kv_heads, shape.head_dim)
    for start, part in windows(ids, shape.context):
        store = KVStore(Geometry(shape.layers, shape.kv_heads, shape.head_dim), recent=0)
        SegmentedPass(engine, len(part), found.attend).forward(part, store)
        found.count += len(part) - 1
        if progress is not None:
            progress(start + len(part), len(ids))
    return found


def key_basis(statistics: KeyStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Matrices and mean keys that statistics call for.

    Returns:
        float32 [2, layers, kv_heads, head_dim, head_dim], what a query and a key are multiplied with from the right, as
        rows; float32 [layers, kv_heads, head_dim], mean keys in the new basis.
    """
    s, head_dim = statistics, statistics.plain.shape[-1]
    mean = mean_of(s.plain, s.count)
    weight = np.maximum(s.weight, 1e-30)[..., None, None]
    across = mean[..., :, None] * s.key_sums[..., None, :]
    keys = (s.keys - across - across.swapaxes(-1, -2)) / weight + mean[..., :, None] * mean[..., None, :]
    matrix = balanced(keys, s.queries / weight, head_rotation(head_dim)[1])
    inverse = np.linalg.inv(matrix)
    rows = np.stack([inverse, matrix.swapaxes(-1, -2)])  # x A^T of keys; x A^-1 of queries
    return rows.astype(np.float32), np.einsum("...ij,...j->...i", matrix, mean).astype(np.float32)


def balanced(keys: np.ndarray, queries: np.ndarray, mixer: np.ndarray) -> np.ndarray:
    """A of the module's definition: keys become A k, queries A^-T q.

    Args:
        keys, queries: covariances, float64 [..., d, d].
        mixer: orthonormal, [d, d], applied last.
    """
    keys, queries = _damped(keys), _damped(queries)
    half, inverse = _power(keys, 0.5), _power(keys, -0.5)
    symmetric = _power(inverse @ _power(half @ queries @ half, 0.5) @ inverse, 0.5)
    axes = np.linalg.eigh(symmetric @ keys @ symmetric)[1][..., ::-1]
    return mixer @ axes.swapaxes(-1, -2) @ symmetric


def _damped(s: np.ndarray) -> np.ndarray:
    """A covariance with `DAMPING` added; the identity where nothing was attended to."""
    d = s.shape[-1]
    mean = np.trace(s, axis1=-2, axis2=-1)[..., None, None] / d
    return np.where(mean > 0, s / np.where(mean > 0, mean, 1) + DAMPING * np.eye(d), np.eye(d))


def _power(s: np.ndarray, exponent: float) -> np.ndarray:
    """A power of symmetric positive matrices, float64 [..., d, d]."""
    values, vectors = np.linalg.eigh(s)
    values = np.maximum(values, 1e-12 * values[..., -1:])
    return (vectors * values[..., None, :] ** exponent) @ vectors.swapaxes(-1, -2)
