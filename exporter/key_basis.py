"""A basis of keys, per layer and KV head, in which their quantization hurts attention least.

Scores do not change when keys become A k and queries A^-T q. What does change is how an error of a code weighs: codes
of one scale spread their error evenly over the channels, so the channels should matter alike. With Sk the covariance of
the keys that are attended to and Sq that of the queries that attend to them, both beyond the recent window and the
sinks, the error of codes is least where tr(A Sk A^T) tr(A^-T Sq A^-1) is:

    A^T A = M = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2

A matrix of its own for every head would cost a tenth of a decode step. M is nearly a diagonal one and a few outliers:
channels are scaled, a vector grows along some axes (and a query shrinks), and the Hadamard matrix of the rotation mixes
the channels as ever. Signs of the scales are free: they are chosen so that the mixed channels vary alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvq.exporter.calibration import mean_of
from kvq.exporter.key_statistics import KeyStatistics

# Share of the mean variance added to all axes: a few thousand tokens do not fill 64 of them evenly.
DAMPING = 0.3
RANK = 4  # axes of a head, beside the scales of its channels
ROUNDS = 3  # of fitting scales and axes in turn, and of choosing signs


@dataclass(frozen=True)
class KeyBasis:
    """What happens to keys behind the rotary embedding and in front of the rotation; queries undergo the inverse.

    First its channels are scaled: x * scale. Then it grows along the axes: x + sum (stretch - 1) (x . axis) axis.

    Attributes:
        scale: float32 [layers, kv_heads, head_dim], of either sign.
        axes: float32 [layers, kv_heads, rank, head_dim], orthonormal.
        stretch: float32 [layers, kv_heads, rank], positive.
    """

    scale: np.ndarray
    axes: np.ndarray
    stretch: np.ndarray

    def matrices(self) -> np.ndarray:
        """What a key, as a column, is multiplied with: float64 [layers, kv_heads, head_dim, head_dim]."""
        return _grown(self.axes, self.stretch) * self.scale.astype(np.float64)[..., None, :]


def key_basis(statistics: KeyStatistics, rotation: np.ndarray) -> tuple[KeyBasis, np.ndarray]:
    """The basis and the mean keys that statistics call for.

    Args:
        statistics: of rotated queries and keys.
        rotation: [head_dim, head_dim], orthonormal.

    Returns:
        the basis; float32 [layers, kv_heads, head_dim], mean keys in the new basis and rotated.
    """
    s = statistics
    mean = mean_of(s.plain, s.count)
    weight = np.maximum(s.weight, 1e-30)[..., None, None]
    across = mean[..., :, None] * s.key_sums[..., None, :]
    keys = (s.keys - across - across.swapaxes(-1, -2)) / weight + mean[..., :, None] * mean[..., None, :]
    # Rotated x is x R, as a row.
    keys, queries = (rotation @ covariance @ rotation.T for covariance in (keys, s.queries / weight))
    basis = balanced(keys, queries, rotation)
    return basis, np.einsum("...ij,...j->...i", rotation.T @ basis.matrices() @ rotation, mean).astype(np.float32)


def balanced(keys: np.ndarray, queries: np.ndarray, rotation: np.ndarray, rank: int = RANK) -> KeyBasis:
    """The basis of the module's definition, as near as scales and some axes come to it.

    Args:
        keys, queries: covariances, float64 [..., d, d].
        rotation: orthonormal, [d, d], that follows.
        rank: axes, at most d.
    """
    keys, queries = _damped(keys), _damped(queries)
    scale = (_diagonal(queries) / _diagonal(keys)) ** 0.25
    axes, stretch = np.zeros((*scale.shape[:-1], 0, scale.shape[-1])), np.zeros((*scale.shape[:-1], 0))
    for _ in range(ROUNDS):
        # With given axes, scales are best where each channel has as large a part in one trace as in the other.
        in_keys = _parts(keys * _grown(axes, stretch**2), scale)
        in_queries = _parts(queries * _grown(axes, stretch**-2), 1 / scale)
        scale = scale * np.clip(in_queries / in_keys, 0.4, 2.5) ** 0.25
        metric = _metric(_scaled(keys, scale), _scaled(queries, 1 / scale))
        axes, stretch = _outliers(metric, min(rank, keys.shape[-1]))
    grown = _grown(axes, stretch)
    # Signs of what is stretched already are signs of scales and axes alike.
    signs = _signs(grown @ _scaled(keys, scale) @ grown, rotation)
    return KeyBasis(*(x.astype(np.float32) for x in (signs * scale, signs[..., None, :] * axes, stretch)))


def _damped(s: np.ndarray) -> np.ndarray:
    """A covariance with `DAMPING` added; the identity where nothing was attended to."""
    d = s.shape[-1]
    mean = np.trace(s, axis1=-2, axis2=-1)[..., None, None] / d
    return np.where(mean > 0, s / np.where(mean > 0, mean, 1) + DAMPING * np.eye(d), np.eye(d))


def _metric(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """M of the module's definition."""
    half, inverse = _power(keys, 0.5), _power(keys, -0.5)
    return inverse @ _power(half @ queries @ half, 0.5) @ inverse


def _outliers(metric: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes [..., rank, d] along which a metric differs most from its median, and roots of the ratios [..., rank]."""
    values, vectors = np.linalg.eigh(metric)
    logs = np.log(values)
    logs -= np.median(logs, -1, keepdims=True)
    chosen = np.argsort(-abs(logs), -1)[..., :rank]
    axes = np.take_along_axis(vectors, chosen[..., None, :], -1).swapaxes(-1, -2)
    return axes, np.exp(np.take_along_axis(logs, chosen, -1) / 2)


def _grown(axes: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """The symmetric matrix that stretches along axes, float64 [..., d, d]."""
    axes, stretch = axes.astype(np.float64), stretch.astype(np.float64)
    return np.eye(axes.shape[-1]) + axes.swapaxes(-1, -2) @ ((stretch - 1)[..., None] * axes)


def _parts(s: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Parts of the channels in scale^T s scale, [..., d]; together 1 but for those that are raised to a little."""
    parts = scale * np.einsum("...cd,...d->...c", s, scale)
    return np.maximum(parts / parts.sum(-1, keepdims=True), 1e-4)


def _signs(s: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Signs of channels of covariance s that even out the variances behind a rotation, [..., d]; found one by one."""
    signs = np.ones(s.shape[:-1])
    variances = np.einsum("ci,...cd,di->...i", rotation, s, rotation, optimize=True)
    for _ in range(ROUNDS):
        for c, row in enumerate(rotation):
            others = s[..., c, :] * signs
            others[..., c] = 0
            turned = variances - 4 * signs[..., c, None] * row * (others @ rotation)
            better = (turned**2).sum(-1) < (variances**2).sum(-1)
            variances = np.where(better[..., None], turned, variances)
            signs[..., c] *= 1 - 2 * better
    return signs


def _diagonal(s: np.ndarray) -> np.ndarray:
    return np.diagonal(s, axis1=-2, axis2=-1)


def _scaled(s: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Covariance of scaled channels."""
    return s * scale[..., :, None] * scale[..., None, :]


def _power(s: np.ndarray, exponent: float) -> np.ndarray:
    """A power of symmetric positive matrices, float64 [..., d, d]."""
    values, vectors = np.linalg.eigh(s)
    values = np.maximum(values, 1e-12 * values[..., -1:])
    return (vectors * values[..., None, :] ** exponent) @ vectors.swapaxes(-1, -2)
