"""16 bits: IEEE half precision, no scale."""

from __future__ import annotations

import numpy as np

from kvq.runtime.precision.codecs.base import HALF_MAX, Codec, absmax, from_words, to_words, within
from kvq.runtime.precision.precision import Precision


class HalfCodec(Codec):
    """Codes are float16 values, two a word."""

    precision = Precision(16, "16", bits=16)
    has_scale = False

    def valid(self, codes: np.ndarray) -> bool:
        # The exponent of infinities and NaN is all ones; comparing halves as numbers takes several times as long.
        return not ((codes.view("<u2") & 0x7C00) == 0x7C00).any()

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        within(absmax(x), HALF_MAX)
        codes = to_words(x.astype("<f2"), 2)
        return codes.view(np.uint8), np.empty((*x.shape[:-1], 0), np.float16)

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        np.copyto(out, from_words(codes.view("<f2"), 2, out.shape[-1]))


CODECS = {codec.precision.id: codec for codec in (HalfCodec(),)}
