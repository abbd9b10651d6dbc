"""A throw-away codec that native code has no kernels for: 3 bits, uniform and symmetric, in numpy alone."""

from __future__ import annotations

import numpy as np

from kvq.runtime.precision.codecs.base import Codec, absmax, half_scale
from kvq.runtime.precision.precision import Precision


class ThreeBits(Codec):
    """Codes from -4 to 3, one behind the other in a stream of bits: across the borders of words."""

    precision = Precision(6, "s3", 3)
    has_scale = True

    def encode(self, x, feedback=None):
        scales = half_scale(absmax(x) / np.float32(3))
        scale = scales.astype(np.float32)
        quotient = np.divide(x, scale, out=np.zeros(x.shape, np.float32), where=scale > 0)
        codes = (np.clip(np.rint(quotient), -4, 3) + 4).astype(np.uint8)
        bits = (codes[..., None] >> np.arange(3, dtype=np.uint8)) & 1
        stream = np.zeros((*x.shape[:-1], 8 * self.code_bytes(x.shape[-1])), np.uint8)
        stream[..., : 3 * x.shape[-1]] = bits.reshape(*x.shape[:-1], -1)
        return np.packbits(stream, axis=-1, bitorder="little"), scales

    def decode(self, codes, scales, out):
        head_dim = out.shape[-1]
        stream = np.unpackbits(codes, axis=-1, bitorder="little")[..., : 3 * head_dim]
        levels = stream.reshape(*codes.shape[:-1], head_dim, 3) @ np.array([1, 2, 4], np.float32) - 4
        np.multiply(levels, scales.astype(np.float32), out=out)
