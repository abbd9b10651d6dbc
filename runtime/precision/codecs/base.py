"""The interface of a codec: vectors of one head <-> packed codes and a half-precision scale.

The codes of a vector are little-endian 32-bit words, and neighbouring words hold neighbouring
channels: with w words of n codes, code i of word j is channel i * w + j. So a vector register of
words, shifted by i codes, is a register of neighbouring channels, for every width alike; the
four bytes of a word are what an 8-bit dot-product instruction sums up. Where the channels do not
fill the words (2 bits, head_dim not a multiple of 16), the last codes are zero and not decoded. A codec
whose bits do not divide a word lays them out in parts that do, see `codebook` for 3 bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from kvq.runtime.errors import NonFiniteError
from kvq.runtime.precision.precision import Precision

HALF_MAX = 65504.0  # largest finite IEEE half
WORD_BYTES = 4


class Codec(ABC):
    """Stores vectors ``float32 [..., head_dim]`` at one precision.

    One vector (a token's key or value in one head) becomes ``code_bytes(head_dim)`` bytes and,
    where ``has_scale``, one float16 scale. Codecs hold no state: equal input gives equal bytes.

    Attributes:
        limit: largest magnitude it takes, where that is less than what its scales allow.
    """

    precision: Precision
    has_scale: bool
    limit: float | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.precision.bits

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of codes for one vector: whole words."""
        return WORD_BYTES * -(-head_dim * self.bits // (8 * WORD_BYTES))

    def valid(self, codes: np.ndarray) -> bool:
        """Whether codes uint8 [...], which may come from a damaged file, all stand for finite numbers."""
        return True

    @abstractmethod
    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """float32 [..., head_dim] -> codes uint8 [..., code_bytes], scales float16 [..., 1].

        Args:
            x: the vectors; with feedback at least [tokens, head_dim].
            feedback: float16 [..., head_dim, head_dim], of x's leading axes but that of the tokens, or None. Entry
                (i, j), j > i, is how much of channel i's error is taken from channel j before that is rounded. Codecs
                whose errors are too small to matter leave it out.

        A codec without scales returns an empty last axis, scales float16 [..., 0], so that
        every pair of arrays is stored, measured and saved alike.

        Raises:
            NonFiniteError: NaN, infinity, or values whose scale exceeds half precision.
        """

    @abstractmethod
    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        """Write the decoded vectors to `out`, float32 [..., head_dim]; the inverse of `encode`."""

    def roundtrip(self, x: np.ndarray, feedback: np.ndarray | None = None) -> np.ndarray:
        """What a reader of the cache sees of `x`: decode(encode(x, feedback)), float32 of the same shape."""
        out = np.empty(x.shape, np.float32)
        codes, scales = self.encode(np.asarray(x, np.float32), feedback)
        self.decode(codes, scales, out)
        return out

    def vector_bytes(self, head_dim: int) -> int:
        """Codes plus scale of one vector, in bytes."""
        return self.code_bytes(head_dim) + (2 if self.has_scale else 0)


def to_words(x: np.ndarray, codes_per_word: int) -> np.ndarray:
    """Channels [..., head_dim] in the order of their words, contiguous [..., words * codes_per_word], zero-filled."""
    words = -(-x.shape[-1] // codes_per_word)
    if words * codes_per_word != x.shape[-1]:
        filled = np.zeros((*x.shape[:-1], words * codes_per_word), x.dtype)
        filled[..., : x.shape[-1]] = x
        x = filled
    by_word = x.reshape(*x.shape[:-1], codes_per_word, words).swapaxes(-1, -2)
    return np.ascontiguousarray(by_word).reshape(x.shape)


def from_words(x: np.ndarray, codes_per_word: int, head_dim: int) -> np.ndarray:
    """The inverse of `to_words`: [..., words * codes_per_word] -> [..., head_dim]."""
    by_word = x.reshape(*x.shape[:-1], x.shape[-1] // codes_per_word, codes_per_word)
    return by_word.swapaxes(-1, -2).reshape(x.shape)[..., :head_dim]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [..., n] below 2^bits -> uint8 [..., n * bits / 8], the first in the lowest bits; bits: 1, 2 or 4."""
    each = 8 // bits
    packed = codes[..., 0::each]
    for i in range(1, each):
        packed = packed | (codes[..., i::each] << (bits * i))
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: uint8 [..., n] -> uint8 [..., n * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * len(shifts))


def absmax(x: np.ndarray) -> np.ndarray:
    """max |x| over the last axis, kept as float32 [..., 1]; the one place where bad values are refused.

    Raises:
        NonFiniteError: x holds NaN or infinity.
    """
    peak = np.maximum(x.max(axis=-1, keepdims=True), -x.min(axis=-1, keepdims=True)) + np.float32(0)  # no -0, of zeros
    if not np.isfinite(peak).all():
        raise NonFiniteError(
            "a key or value is NaN or infinite: the model overflowed on this input;"
            " check the checkpoint, or export it with fp32 weights"
        )
    return peak


def within(peak: np.ndarray, limit: float) -> np.ndarray:
    """The largest magnitudes float32 [..., 1] unchanged, if they are at most `limit`, which half precision holds.

    Raises:
        NonFiniteError: one exceeds it.
    """
    if peak.size and peak.max() > limit:
        raise NonFiniteError(
            f"a key or value of magnitude {peak.max():.3g} exceeds half precision ({limit:.0f}):"
            " the model overflowed on this input; check the checkpoint, or use int8 with recent=0"
        )
    return peak


def half_scale(scale: np.ndarray) -> np.ndarray:
    """Round positive float32 scales UP to float16, so that the largest value never clips.

    Raises:
        NonFiniteError: a scale exceeds the half-precision range.
    """
    if scale.size and scale.max() > HALF_MAX:
        raise NonFiniteError(
            f"a key or value is so large that its scale {scale.max():.3g} exceeds half precision:"
            " the model overflowed on this input; check the checkpoint"
        )
    rounded = scale.astype(np.float16)
    low = rounded.astype(np.float32) < scale
    return np.nextafter(rounded, np.float16(np.inf), out=rounded, where=low)
