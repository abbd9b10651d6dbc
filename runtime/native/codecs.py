"""The codecs with native encoding: the same bytes as numpy's, in a fraction of the time."""

from __future__ import annotations

import numpy as np

from kvq.runtime.native.library import MOST_CHANNELS, REFUSED_VALUE, check, knows, load
from kvq.runtime.native.mover import NativeMover
from kvq.runtime.precision.codecs import NUMPY, Codec, CodecSet


class NativeCodec(Codec):
    """A numpy codec whose `encode` runs in C; values that C refuses are given to numpy, which says why.

    Args:
        reference: of a precision that the library knows.
        kernel: index of the instruction set, see `library.kernels`.
    """

    def __init__(self, reference: Codec, kernel: int) -> None:
        self.reference = reference
        self.precision, self.has_scale, self.limit = reference.precision, reference.has_scale, reference.limit
        self._library, self._kernel = load(), kernel

    def code_bytes(self, head_dim: int) -> int:
        return self.reference.code_bytes(head_dim)

    def encode(self, x: np.ndarray, feedback: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        head_dim = x.shape[-1]
        if head_dim > MOST_CHANNELS or (self.limit is not None and x.size and np.abs(x).max() > self.limit):
            return self.reference.encode(x, feedback)
        x = np.ascontiguousarray(x, np.float32)
        codes = np.empty((*x.shape[:-1], self.code_bytes(head_dim)), np.uint8)
        scales = np.empty((*x.shape[:-1], int(self.has_scale)), np.float16)
        vectors = x.size // head_dim
        fed = feedback
        if fed is not None:  # a matrix for every run of tokens
            fed = np.ascontiguousarray(np.broadcast_to(fed, (*x.shape[:-2], head_dim, head_dim)), np.float16)
        status = self._library.kvq_encode(
            *(self._kernel, self.precision.id, x.ctypes.data, vectors, head_dim),
            *(None if fed is None else fed.ctypes.data, max(1, x.shape[-2]) if fed is not None else 1),
            *(codes.ctypes.data, scales.ctypes.data),
        )
        if status == REFUSED_VALUE:
            return self.reference.encode(x, feedback)
        check(status)
        return codes, scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        self.reference.decode(codes, scales, out)


def native_codecs(kernel: int) -> CodecSet:
    """The codecs for an instruction set, see `library.kernels`; those of precisions that the library does not know are
    numpy's own.
    """

    def best(codec: Codec) -> Codec:
        return NativeCodec(codec, kernel) if knows(codec) else codec

    by_id = {id_: best(codec) for id_, codec in NUMPY.by_id.items()}
    windows = {bits: best(codec) for bits, codec in NUMPY.windows.items()}
    return CodecSet(by_id, windows, NativeMover(kernel))
