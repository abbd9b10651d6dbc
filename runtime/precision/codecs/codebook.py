"""2, 3 and 4 bits: codebooks of four, eight and sixteen levels with a scale close to unbiased.

A rotated head is close to Gaussian, so the levels are those of the Lloyd-Max quantizer of a normal variable (J. Max,
Quantizing for Minimum Distortion, 1960), fitted to each vector by least squares. They are taken as whole numbers that
fit a signed byte, which integer dot products need; the error grows by less than 1e-4 of itself.

The stored scale is not the least-squares one. At 2 bits that one makes every vector 12 % too short, and what attention
adds up over many tokens keeps this error while the others average out. At the unbiased scale the stored vector's
projection on the exact one is the exact one, with a slightly larger error; four fifths of the way to it, a vector is
2 % too short (docs/measurements.md has the divergences). Scales are small enough that what fits a half can be stored.

With `feedback` (see `base.Codec.encode`) codes are chosen again, one channel after the other, by the scale that has
been found: what a channel's rounding did wrong is made up for by the channels behind it, as far as readers mix the two.
A scale is then fitted to these codes.

3 bits fill words in two parts: the two low bits of every code as at 2 bits, then the high bits, a word of which serves
two words of low bits. Byte b of a word of low bits has the codes 4 b to 4 b + 3; their high bits are the bits 0 to 3,
for the second word 4 to 7, of byte b of the word of high bits.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from kvq.runtime.precision.codecs.base import (
    WORD_BYTES,
    Codec,
    absmax,
    from_words,
    half_scale,
    pack,
    to_words,
    unpack,
)
from kvq.runtime.precision.precision import Precision

MOST_GAIN = 1.5  # of the stored scale over the least-squares one; 1.1 on Gaussian vectors at 2 bits
FIXED_ONE = 1 << 16  # the largest value of a vector, while its scale is fitted


class CodebookCodec(Codec):
    """Levels in ascending order are the codes 0, 1, 2, ...

    Args:
        precision: id, name and bits.
        levels: the positive half of the levels, ascending whole numbers.
        parts: how many of them make 1: the scale is of levels / parts.
        first: scale that the fit begins with, in root mean squares of the vector.

    Attributes:
        levels: float32 [2^bits], what a code stands for before its scale.
    """

    has_scale = True

    def __init__(self, precision: Precision, levels: tuple[int, ...], first: float, parts: int = 1) -> None:
        self.precision = precision
        self._whole = np.array(levels, np.int64)
        self._first, self._parts = first, parts
        # float32, so that the border of 2 bits, which is no short fraction, is the same in every implementation.
        self._borders = ((self._whole[1:] + self._whole[:-1]) / (2 * parts)).astype(np.float32)
        self.levels = np.concatenate([-self._whole[::-1], self._whole]).astype(np.float32) / np.float32(parts)

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = self.fit(x, feedback)
        return self.packed(codes), scales

    def fit(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 of x's shape and scales float16 [..., 1] of vectors float32 [..., head_dim]."""
        # Work on x / absmax: squares of values near the float limits would leave the range. Whole
        # numbers make the sums exact, so any other implementation can give the same bytes.
        peak = absmax(x)
        unit = np.divide(x, peak, out=np.zeros(x.shape, np.float32), where=peak > 0)
        magnitude = np.abs(np.rint(unit * np.float32(FIXED_ONE))).astype(np.int64)
        total = np.sum(magnitude**2, axis=-1, keepdims=True)
        scale = self._first * np.sqrt(total / x.shape[-1])
        # Given the codes, the best scale is a projection; given the scale, the best codes are the nearest levels.
        # Three rounds end close to the best codes there are, 0.6 % above at 64 channels and 2 bits.
        for _ in range(3):
            rank = np.zeros(magnitude.shape, np.uint8)
            for border in self._borders:
                rank += magnitude > scale * border
            level = self._whole[rank]
            products = np.sum(magnitude * level, axis=-1, keepdims=True)
            scale = self._parts * products / np.sum(level**2, axis=-1, keepdims=True)
        positive, scale = x >= 0, self._stored_scale(scale, products, total)
        if feedback is not None:
            signed = np.where(positive, magnitude, -magnitude)
            rank, positive = self._fed_back(signed.astype(np.float32), scale.astype(np.float32), feedback)
            level = np.where(positive, self._whole[rank], -self._whole[rank])
            products = np.sum(signed * level, axis=-1, keepdims=True)
            scale = self._parts * np.maximum(products, 0) / np.sum(level**2, axis=-1, keepdims=True)
            scale = self._stored_scale(scale, products, total)
        half = np.uint8(len(self._whole))
        codes = np.where(positive, half + rank, half - 1 - rank)
        return codes, half_scale((scale * (peak / FIXED_ONE)).astype(np.float32))

    def _stored_scale(self, scale: np.ndarray, products: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Four fifths of the way from the least-squares scale to the unbiased one, float64 [..., 1]."""
        unbiased = np.divide(self._parts * total, products, out=np.zeros(scale.shape), where=products > 0)
        # A vector that the levels do not fit at all must not grow without bound.
        return np.minimum((scale + 4 * unbiased) / 5, MOST_GAIN * scale)

    def _fed_back(self, rest: np.ndarray, scale: np.ndarray, feedback: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of the levels, uint8 [..., head_dim], and signs; each channel's error is taken from those to come.

        Args:
            rest: float32 [..., tokens, head_dim], changed.
            scale: float32 [..., tokens, 1].
            feedback: see `encode`.
        """
        rank, positive = np.zeros(rest.shape, np.uint8), np.empty(rest.shape, bool)
        # Products of 13 bits with halves or levels are exact, so a fused multiply-add gives these bytes, too.
        unit, whole = _short(scale / np.float32(self._parts)), self._whole.astype(np.float32)
        borders, values = unit * ((whole[1:] + whole[:-1]) / 2), unit * whole
        for channel in range(rest.shape[-1]):
            now, later = rest[..., channel], rest[..., channel + 1 :]
            magnitude, above = np.abs(now), now >= 0
            chosen = (magnitude[..., None] > borders).sum(-1, dtype=np.uint8)
            value = np.take_along_axis(values, chosen[..., None].astype(np.intp), -1)[..., 0]
            error = _short(now - np.where(above, value, -value))
            later -= error[..., None] * feedback[..., None, channel, channel + 1 :]
            rank[..., channel], positive[..., channel] = chosen, above
        return rank, positive

    def packed(self, codes: np.ndarray) -> np.ndarray:
        """Codes uint8 [..., head_dim] -> uint8 [..., code_bytes]."""
        return pack(to_words(codes, 32 // self.bits), self.bits)

    @cached_property
    def _bytes(self) -> np.ndarray:
        """The levels of every byte, float32 [256, 8 / bits]: one table look-up decodes so many values."""
        return self.levels[unpack(np.arange(256, dtype=np.uint8)[:, None], self.bits)]

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        values = np.take(self._bytes, codes, axis=0, mode="clip")
        values = values.reshape(*codes.shape[:-1], codes.shape[-1] * (8 // self.bits))
        np.multiply(from_words(values, 32 // self.bits, out.shape[-1]), scales.astype(np.float32), out=out)


def feeds_back_little(feedback: np.ndarray) -> bool:
    """Whether no vector's errors can grow beyond single precision, see `Codec.encode`; not where feedback has NaN.

    Beyond it, a fused multiply-add would have another result.
    """
    most = np.full(feedback.shape[:-1], 2.0 * FIXED_ONE)  # of what may be left of each channel, and of its error
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in range(feedback.shape[-1]):
            later = slice(channel + 1, None)
            most[..., later] += most[..., channel, None] * np.abs(feedback[..., channel, later])
    return bool((most < 2.0**100).all())


def _short(x: np.ndarray) -> np.ndarray:
    """float32 with 13 significant bits, towards 0."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFF800)).view(np.float32)


class ThreeBitCodec(CodebookCodec):
    """A codebook whose codes fill words in two parts, see the top of this module."""

    def code_bytes(self, head_dim: int) -> int:
        low = -(-head_dim // 16)
        return WORD_BYTES * (low + -(-low // 2))

    def packed(self, codes: np.ndarray) -> np.ndarray:
        low, high = to_words(codes & 3, 16), to_words(codes >> 2, 16)
        words = high.shape[-1] // 16
        if words % 2:
            high = np.concatenate([high, np.zeros((*high.shape[:-1], 16), np.uint8)], axis=-1)
        # [..., high words, which of its low words, byte, code of the byte] -> a byte has both words' codes.
        by_byte = high.reshape(*high.shape[:-1], high.shape[-1] // 32, 2, 4, 4).swapaxes(-3, -2)
        return np.concatenate([pack(low, 2), pack(by_byte.reshape(high.shape), 1)], axis=-1)

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        words = -(-out.shape[-1] // 16)
        low = unpack(codes[..., : WORD_BYTES * words], 2)
        high = unpack(codes[..., WORD_BYTES * words :], 1)
        by_word = high.reshape(*high.shape[:-1], high.shape[-1] // 32, 4, 2, 4).swapaxes(-3, -2).reshape(high.shape)
        values = np.take(self.levels, low | by_word[..., : 16 * words] << 2)
        np.multiply(from_words(values, 16, out.shape[-1]), scales.astype(np.float32), out=out)


# What a fit begins with is the unit of the levels for a normal variable: at 2 bits its inner level.
_OFFERED = (
    CodebookCodec(Precision(2, "2", bits=2), (3, 10), first=0.4528, parts=3),
    ThreeBitCodec(Precision(3, "3", bits=3), (3, 9, 16, 26), first=0.08302),
    CodebookCodec(Precision(5, "4", bits=4), (4, 13, 22, 31, 41, 53, 68, 90), first=0.03030),
)
CODECS = {codec.precision.id: codec for codec in _OFFERED}
