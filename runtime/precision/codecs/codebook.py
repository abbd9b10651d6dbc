"""2 bits: a four-level codebook with a scale close to unbiased.

A rotated head is close to Gaussian, so the codes are those of the Lloyd-Max quantizer of a normal
variable (J. Max, Quantizing for Minimum Distortion, 1960): levels +-0.4528 and +-1.5104 standard
deviations, decision borders at 0 and +-0.9816, fitted to each vector by least squares. The ratio of
the levels, 3.336, is taken as 10/3: so they are the whole numbers +-3 and +-10 that integer dot
products need, and the error grows by less than 1e-5 of itself.

The stored scale is not the least-squares one. That one makes every vector 12 % too short, and what
attention adds up over many tokens keeps this error while the others average out. At the unbiased
scale the stored vector's projection on the exact one is the exact one, with a slightly larger error;
four fifths of the way to it, a vector is 2 % too short (docs/measurements.md has the divergences).
Scales are in units of the inner level: then neither exceeds the largest value, and what fits a half
can be stored.
"""

from __future__ import annotations

import numpy as np

from kvq.runtime.precision.codecs.base import Codec, absmax, from_words, half_scale, to_words
from kvq.runtime.precision.precision import Precision

INNER = 0.4528  # in standard deviations
LEVELS = np.array([-10 / 3, -1.0, 1.0, 10 / 3], np.float32)
BORDER = np.float32((1 + 10 / 3) / 2)
MOST_GAIN = 1.5  # of the stored scale over the least-squares one; 1.1 on Gaussian vectors
FIXED_ONE = 1 << 16  # the largest value of a vector, while its scale is fitted


def pack2(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., n] in [0, 3] -> uint8 [..., n // 4]; index 4i in the lowest two bits."""
    return codes[..., 0::4] | (codes[..., 1::4] << 2) | (codes[..., 2::4] << 4) | (codes[..., 3::4] << 6)


def unpack2(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n // 4] -> uint8 [..., n]; the inverse of `pack2`."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & 3).reshape(*packed.shape[:-1], packed.shape[-1] * 4)


# The four levels of every byte, float32 [256, 4]: one table look-up decodes four values.
QUADS = LEVELS[unpack2(np.arange(256, dtype=np.uint8)[:, None])]


class CodebookCodec(Codec):
    """Four values a byte."""

    precision = Precision(2, "2", bits=2)
    has_scale = True

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Work on x / absmax: squares of values near the float limits would leave the range. Whole
        # numbers make the sums exact, so any other implementation can give the same bytes.
        peak = absmax(x)
        unit = np.divide(x, peak, out=np.zeros(x.shape, np.float32), where=peak > 0)
        magnitude = np.abs(np.rint(unit * np.float32(FIXED_ONE))).astype(np.int64)
        total = np.sum(magnitude**2, axis=-1, keepdims=True)
        scale = INNER * np.sqrt(total / x.shape[-1])
        # Given the codes, the best scale is a projection; given the scale, the best codes are
        # the nearest levels. Three rounds end close to the best codes there are, 0.6 % above at 64 channels.
        for _ in range(3):
            outer = magnitude > scale * BORDER
            products = np.sum(magnitude * np.where(outer, 10, 3), axis=-1, keepdims=True)
            squares = np.sum(np.where(outer, 100, 9), axis=-1, keepdims=True)
            scale = 3 * products / squares  # levels 3 and 10 are in thirds of the inner level
        unbiased = np.divide(3 * total, products, out=np.zeros(scale.shape), where=products > 0)
        # A vector that the levels do not fit at all must not grow without bound.
        scale = np.minimum((scale + 4 * unbiased) / 5, MOST_GAIN * scale)
        codes = np.where(x >= 0, 2 + outer, 1 - outer).astype(np.uint8)  # -outer 0, -inner 1, +inner 2, +outer 3
        scales = half_scale((scale * (peak / FIXED_ONE)).astype(np.float32))
        return pack2(to_words(codes, 16)), scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        quads = np.take(QUADS, codes, axis=0, mode="clip").reshape(*codes.shape[:-1], codes.shape[-1] * 4)
        np.multiply(from_words(quads, 16, out.shape[-1]), scales.astype(np.float32), out=out)


CODECS = {codec.precision.id: codec for codec in (CodebookCodec(),)}
