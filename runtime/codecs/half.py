"""16 bits: IEEE half precision, no scale."""

from __future__ import annotations

import numpy as np

from kvq.runtime.codecs.base import Codec, absmax, within_half


class HalfCodec(Codec):
    """Codes are the little-endian bytes of float16 values."""

    bits = 16
    has_scale = False

    def code_bytes(self, head_dim: int) -> int:
        return 2 * head_dim

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        within_half(absmax(x))
        codes = np.ascontiguousarray(x, dtype="<f2").view(np.uint8)
        return codes, np.empty((*x.shape[:-1], 0), np.float16)

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        np.copyto(out, codes.view("<f2"))


CODECS = {16: HalfCodec()}
