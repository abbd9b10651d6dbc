"""16 bits: IEEE half precision, no scale."""

from __future__ import annotations

import numpy as np

from kvq.runtime.precision.codecs.base import Codec, absmax, from_words, to_words, within_half


class HalfCodec(Codec):
    """Codes are float16 values, two a word."""

    bits = 16
    has_scale = False

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        within_half(absmax(x))
        codes = to_words(x.astype("<f2"), 2)
        return codes.view(np.uint8), np.empty((*x.shape[:-1], 0), np.float16)

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        np.copyto(out, from_words(codes.view("<f2"), 2, out.shape[-1]))


CODECS = {16: HalfCodec()}
