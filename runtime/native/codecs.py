"""The codecs with native encoding: the same bytes as numpy's, in a fraction of the time."""

from __future__ import annotations

import numpy as np

from kvq.runtime.codecs import NUMPY, Codec, CodecSet
from kvq.runtime.native.library import WINDOW_BITS, load

MOST_CHANNELS = 1024


class NativeCodec(Codec):
    """A numpy codec whose `encode` runs in C; what C refuses is given to numpy, which says why."""

    def __init__(self, reference: Codec, code: int, kernel: int) -> None:
        self.reference = reference
        self.bits, self.has_scale = reference.bits, reference.has_scale
        self._library, self._code, self._kernel = load(), code, kernel

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        head_dim = x.shape[-1]
        if head_dim > MOST_CHANNELS:
            return self.reference.encode(x)
        x = np.ascontiguousarray(x, np.float32)
        codes = np.empty((*x.shape[:-1], self.code_bytes(head_dim)), np.uint8)
        scales = np.empty((*x.shape[:-1], int(self.has_scale)), np.float16)
        vectors = x.size // head_dim
        arrays = (x.ctypes.data, vectors, head_dim, codes.ctypes.data, scales.ctypes.data)
        if self._library.kvq_encode(self._kernel, self._code, *arrays):
            return self.reference.encode(x)
        return codes, scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        self.reference.decode(codes, scales, out)


def native_codecs(kernel: int) -> CodecSet:
    """The codecs for an instruction set, see `library.kernels`."""
    by_bits: dict[int, Codec] = {bits: NativeCodec(codec, bits, kernel) for bits, codec in NUMPY.by_bits.items()}
    return CodecSet(by_bits, NativeCodec(NUMPY.window, WINDOW_BITS, kernel))
