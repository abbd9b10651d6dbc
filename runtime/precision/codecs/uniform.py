"""8 and 4 bits: symmetric uniform codes, round half to even, scale = absmax / largest code.

The recent window uses the same scheme, at 8 bits or at 16.

Codes and their packing in bytes are those of ONNX Runtime's quantized GroupQueryAttention cache,
so its operators can check ours bit for bit: int8 codes as they are; int4 codes offset by 8, two a
byte, the first in the low half. Only the order of the channels differs, see `base`.
"""

from __future__ import annotations

import numpy as np

from kvq.runtime.precision.codecs.base import (
    HALF_MAX,
    Codec,
    absmax,
    from_words,
    half_scale,
    pack,
    to_words,
    unpack,
    within,
)
from kvq.runtime.precision.precision import Precision


def quantize(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """round(x / scale) clamped to [-2^(bits-1), 2^(bits-1)-1], int8 (int16 for 16 bits) of x's shape.

    `scale` broadcasts against x; where it is zero the codes are zero.
    """
    top = (1 << (bits - 1)) - 1
    scale = np.asarray(scale, np.float32)
    # Division, not multiplication by a reciprocal: the reciprocal of a subnormal overflows,
    # and its rounding would move exact ties.
    quotient = np.divide(x, scale, out=np.zeros(np.broadcast_shapes(x.shape, scale.shape), np.float32), where=scale > 0)
    return np.clip(np.rint(quotient), -top - 1, top).astype(np.int8 if bits <= 8 else np.int16)


def pack4(codes: np.ndarray) -> np.ndarray:
    """int8 [..., n] in [-8, 7] -> uint8 [..., n // 2]; even index low, offset 8."""
    return pack((codes + 8).view(np.uint8), 4)


def unpack4(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n // 2] -> int8 [..., n]; the inverse of `pack4`."""
    return unpack(packed, 4).view(np.int8) - 8


# Both codes of every byte, float32 [256, 2]: one table look-up decodes two values.
PAIRS = unpack4(np.arange(256, dtype=np.uint8)[:, None]).astype(np.float32)


class Int8Codec(Codec):
    """One int8 a value."""

    precision = Precision(8, "8", bits=8)
    has_scale = True

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        scales = half_scale(absmax(x) / np.float32(127))
        return to_words(quantize(x, scales, 8), 4).view(np.uint8), scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        np.multiply(from_words(codes.view(np.int8), 4, out.shape[-1]), scales.astype(np.float32), out=out)


class Int4Codec(Codec):
    """Two values a byte. Sessions of before 0.3 hold it; the codebook of 4 bits is nearer to what it stores."""

    precision = Precision(4, "u4", bits=4)
    has_scale = True

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        scales = half_scale(absmax(x) / np.float32(7))
        codes = (quantize(x, scales, 4) + 8).view(np.uint8)  # before words are filled up with zeros
        return pack(to_words(codes, 8), 4), scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        pairs = np.take(PAIRS, codes, axis=0, mode="clip").reshape(*codes.shape[:-1], codes.shape[-1] * 2)
        np.multiply(from_words(pairs, 8, out.shape[-1]), scales.astype(np.float32), out=out)


class Window8Codec(Int8Codec):
    """`Int8Codec` for the recent window.

    A token must be able to leave the window at any precision, so what could be decoded to more than half precision
    holds is refused: beyond 127 * 512, a scale may be rounded up to more than 65504 / 127.
    """

    limit = 65024.0

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        within(absmax(x), self.limit)
        return super().encode(x, feedback)


class WindowCodec(Codec):
    """One int16 a value, for the recent window only.

    Relative to a vector's largest value it rounds about nine times finer than half precision,
    for the same bytes and a scale. A token must be able to leave the window at any precision, so
    what half precision cannot hold is refused here.
    """

    precision = Precision(15, "window", bits=16, stored=False)
    has_scale = True

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        scales = half_scale(within(absmax(x), HALF_MAX) / np.float32(32767))
        return to_words(quantize(x, scales, 16).astype("<i2", copy=False), 2).view(np.uint8), scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        np.multiply(from_words(codes.view("<i2"), 2, out.shape[-1]), scales.astype(np.float32), out=out)


CODECS = {codec.precision.id: codec for codec in (Int8Codec(), Int4Codec())}
WINDOWS: dict[int, Codec] = {8: Window8Codec(), 16: WindowCodec()}  # of the recent window, by bits
