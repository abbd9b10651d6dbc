"""The mean of keys that turns with their position, see `kvq.runtime.precision.key_turns`: measured, not looked up.

A rotary embedding turns pair i of a key's channels by w_i times the position. As a complex number the pair is
z(p) = e^(i w p) k with k as the weights yield it, and the mean of e^(-i w b) z(p), b the middle of the position's
block, is what all keys of a head have in common. Where w is so large that a block is a good part of a turn, little of
it is left, and where w is so small that no text turns it noticeably, the constant mean has it already: such pairs are
left out. Tokens count by the attention they receive beyond the recent window, as for the basis of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvq.exporter.architectures.description import Model
from kvq.exporter.key_basis import KeyBasis, key_basis
from kvq.exporter.key_statistics import KeyStatistics
from kvq.runtime.errors import CalibrationError
from kvq.runtime.precision.key_turns import BLOCK, MOST_REACH, middle, packed

LONG = 2048  # tokens of a text in which a pair has to turn to be worth its place
LEAST = 0.003  # of all that turning takes off, in any layer, for a pair to be kept


@dataclass(frozen=True)
class Turned:
    """What turns of rotated keys, in no basis yet.

    Attributes:
        frequencies: float32 [layers, pairs].
        vectors: float64 [layers, kv_heads, pairs, 2, head_dim], as `KeyTurns` has them.
    """

    frequencies: np.ndarray
    vectors: np.ndarray

    def in_basis(self, basis: KeyBasis, rotation: np.ndarray) -> Turned:
        """Of keys in a basis: vectors as keys behind it are."""
        change = rotation.T @ basis.matrices() @ rotation
        return replace(self, vectors=np.einsum("lhij,lhpsj->lhpsi", change, self.vectors, optimize=True))

    @property
    def too_far(self) -> list[int]:
        """Layers whose keys would be moved further than readers allow."""
        reach = np.abs(self.vectors).sum(axis=(2, 3)).max(axis=(1, 2))
        return [layer for layer, most in enumerate(reach) if not most <= MOST_REACH / 2]

    @property
    def data(self) -> bytes | None:
        """The file of it; None where nothing turns."""
        return packed(self.frequencies, self.vectors) if self.vectors.any() else None


def turned_means(
    statistics: KeyStatistics, rotation: np.ndarray, left: Sequence[int] = ()
) -> tuple[Turned, KeyStatistics]:
    """The turning means, and the statistics of keys without them.

    Args:
        statistics: of rotated queries and keys, with waves.
        rotation: [head_dim, head_dim], orthonormal.
        left: layers that are left as they are.
    """
    s = statistics
    layers, kv_heads, head_dim = s.plain.shape
    half = head_dim // 2
    # Rows of waves are cosines and sines in turn, those of across cosine times key and sine times key.
    across = (s.wave_keys @ rotation.T).reshape(layers, kv_heads, half, 2, head_dim)
    pair = np.arange(half)
    first, second = across[:, :, pair, :, pair], across[:, :, pair, :, pair + half]  # [half, layers, kv_heads, 2]
    weight = np.maximum(s.weight, 1e-30)
    real = ((first[..., 0] + second[..., 1]) / weight).transpose(1, 2, 0)
    imaginary = ((second[..., 0] - first[..., 1]) / weight).transpose(1, 2, 0)
    vectors = np.zeros((layers, kv_heads, half, 2, head_dim))
    vectors[:, :, pair, 0, pair], vectors[:, :, pair, 0, pair + half] = real, imaginary
    vectors[:, :, pair, 1, pair], vectors[:, :, pair, 1, pair + half] = -imaginary, real
    gains = (real**2 + imaginary**2) * turning(s.frequencies)[:, None]
    kept = _worth(gains, s.frequencies)
    kept[list(left)] = False
    vectors *= kept[:, None, :, None, None]
    rotated = vectors @ rotation
    chosen = np.flatnonzero(rotated.any(axis=(0, 1, 3, 4)))
    turned = Turned(s.frequencies[:, chosen].astype(np.float32), rotated[:, :, chosen])
    return turned, without(s, rotated.reshape(layers, kv_heads, head_dim, head_dim))


def turned_keys(statistics: KeyStatistics, rotation: np.ndarray) -> tuple[KeyBasis, np.ndarray, Turned]:
    """Basis and mean keys as `key_basis` finds them for keys less what turns, and that in the basis.

    Args:
        statistics, rotation: as in `turned_means`.

    Raises:
        CalibrationError: keys of a layer that are too far apart for any basis.
    """
    left: list[int] = []
    for _ in range(len(statistics.plain) + 1):  # each round leaves a layer more
        turned, less = turned_means(statistics, rotation, left)
        basis, means = key_basis(less, rotation)
        found = turned.in_basis(basis, rotation)
        if not found.too_far:
            return basis, means, found
        left += found.too_far
    raise CalibrationError(
        f"keys of layer {left[-1]} cannot be balanced on the calibration text; export with --keys plain"
    )


def turning(frequencies: np.ndarray) -> np.ndarray:
    """How much of a turning mean no constant one has in a long text: shares of its square, of the same shape."""
    places = middle(np.arange(LONG // BLOCK))
    return 1 - np.abs(np.exp(1j * frequencies[..., None] * places).mean(-1)) ** 2


def _worth(gains: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Which pairs are kept, bool [layers, head_dim // 2]: the same ones in all layers of the same frequencies.

    gains: what each takes off the keys' variance, [layers, kv_heads, head_dim // 2].
    """
    shares = (gains / np.maximum(gains.sum(-1, keepdims=True), 1e-30)).mean(1)
    kept = np.zeros(frequencies.shape, bool)
    for row in np.unique(frequencies, axis=0):
        alike = (frequencies == row).all(-1)
        kept[alike] = (shares[alike].mean(0) >= LEAST) & (row != 0)
    return kept


def without(s: KeyStatistics, vectors: np.ndarray) -> KeyStatistics:
    """Statistics of keys less waves times vectors [layers, kv_heads, waves, head_dim]."""
    back = vectors.swapaxes(-1, -2)
    both = back @ s.wave_keys
    layers, kv_heads, head_dim = s.plain.shape
    less = KeyStatistics(layers, kv_heads, head_dim, s.frequencies)
    less.queries, less.weight, less.count = s.queries, s.weight, s.count
    less.keys = s.keys - both - both.swapaxes(-1, -2) + back @ s.waves @ vectors
    less.key_sums = s.key_sums - (back @ s.wave_sums[..., None])[..., 0]
    less.plain = s.plain - (back @ s.plain_waves[:, None, :, None])[..., 0]
    return less


def frequencies_of(model: Model) -> np.ndarray:
    """Frequencies of each layer's rotary embedding, float64 [layers, head_dim // 2]; 0 where there is none."""
    rows = np.zeros((model.shape.layers, model.shape.head_dim // 2))
    for row, layer in zip(rows, model.layers, strict=True):
        if layer.attend.rotary is not None:
            row[:] = model.rotaries[layer.attend.rotary].inv_freq
    return rows
