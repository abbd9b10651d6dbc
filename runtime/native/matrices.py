"""Matrices of weights packed for the native library's products, in memory of their own.

What a file holds lies row by row, for rows to be looked up and for onnxruntime; kvq.h says how a kernel wants it.
"""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.machine import hugepages
from kvq.runtime.native.library import Matrix, check, load

PANEL = 16  # rows that lie side by side
LEAST_BLOCK, MOST_BLOCK = 32, 256
BETWEEN = (5, 6)  # bits of codes that lie in a file as 8 do, a byte each, and so do their zero points


def multiplies(kernel: int) -> bool:
    """Whether an instruction set's products are faster than onnxruntime's."""
    return bool(load().kvq_kernel_products(kernel))


def packs(bits: int, block: int, zeros: bool, offsets: bool = False) -> bool:
    """Whether the library has products with such codes, in blocks of that size, with zero points, offsets or none."""
    whole = LEAST_BLOCK <= block <= MOST_BLOCK and block & (block - 1) == 0
    if bits in BETWEEN:
        return whole and zeros and not offsets
    return whole and zeros + offsets <= {4: 1, 8: 0}.get(bits, -1)


class PackedMatrix:
    """A matrix of quantized weights as kernels read it, empty at first.

    Args:
        n, k: rows and columns.
        bits, block: of a code; weights that share a scale.
        zeros, offsets: whether blocks have zero points, offsets.
        halves: whether scales and offsets are IEEE halves, not floats; only where there are offsets, or bits are of
            `BETWEEN`.

    Attributes:
        nbytes: of all it holds.
        spared: bytes fewer than in a file, whose scales and offsets are floats, and codes of `BETWEEN` a byte each.
        address: of its kvq_matrix, for as long as this object lives.
        shapes: of what `fill` is given for all rows: codes, scales, and zero points. Offsets are as scales.
    """

    def __init__(
        self, n: int, k: int, bits: int, block: int, zeros: bool = False, offsets: bool = False, halves: bool = False
    ) -> None:
        blocks, width, panels = -(-k // block), block * bits // 8, -(-n // PANEL)
        given = width if bits not in BETWEEN else block
        self.shapes = (n, blocks, given), (n, blocks), (n, -(-blocks // 2) if bits == 4 else blocks)
        self._number = np.dtype(np.float16 if halves else np.float32)
        number = self._number.itemsize
        sizes = [panels * blocks * PANEL * each for each in (width, number, number * offsets, zeros)]
        self.nbytes = sum(sizes)
        self.spared = n * blocks * ((4 - number) * (1 + offsets) + given - width)
        memory = hugepages.block(self.nbytes)
        codes, scales, shifts, points = np.split(memory, np.cumsum(sizes)[:-1])
        self._codes = codes.reshape(panels, -1)
        self._scales = scales.view(self._number).reshape(panels, -1)
        self._zeros = points.reshape(panels, -1) if zeros else None
        self._offsets = shifts.view(self._number).reshape(panels, -1) if offsets else None
        self._numbers = (k, blocks, bits, block, int(halves))
        self._matrix = self._described(n, self._codes, self._scales, self._zeros, self._offsets)
        self.address = ctypes.addressof(self._matrix)

    def fill(
        self,
        kernel: int,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
        first: int = 0,
        offsets: np.ndarray | None = None,
    ) -> None:
        """Pack some rows for a kernel; of the last ones `first` + their number may be none of PANEL.

        Args:
            kernel: index of the instruction set, see `kvq.runtime.native.library.kernels`.
            codes: uint8, as `shapes` says, of these rows.
            scales: float32, which halves have to hold exactly where they are halves.
            zeros: zero points, uint8; given if the matrix has them.
            first: of the rows, a multiple of PANEL.
            offsets: float32 [rows, blocks], what the weights of a block are more; given if the matrix has them.

        Raises:
            BackendError: numbers that the library does not take.
        """
        scales = np.ascontiguousarray(scales, self._number)
        offsets = None if offsets is None else np.ascontiguousarray(offsets, self._number)
        given = self._described(len(codes), codes, scales, zeros, offsets)
        arrays = (self._codes, self._scales, self._zeros, self._offsets)
        into = (None if array is None else array[first // PANEL :] for array in arrays)
        check(load().kvq_pack(kernel, ctypes.byref(given), ctypes.byref(self._described(len(codes), *into))))

    def _described(self, n: int, *arrays: np.ndarray | None) -> Matrix:
        addresses = (None if array is None else array.ctypes.data for array in arrays)
        return Matrix(*addresses, n, *self._numbers)
