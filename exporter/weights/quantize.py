"""Block quantization of weight matrices in the layout of onnxruntime's MatMulNBits.

A row of a matrix [n, k] is cut into blocks; each block has one float32 scale and unsigned codes around a zero point:
weight = (code - zero) * scale. Of 8 bits the zero point is in the middle; of fewer it is a code of the block's own, as
16 levels around the middle of the codes would leave some of them out. Contract:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

The operator has codes of 4 and 8 bits. Those of 5 and 6 are for it 8-bit ones that use few of their values; the native
library packs them when a bundle is loaded.

Blocks of a source that have minima are no such grid. What is missing is the same for all weights of a block, its
offset, and is multiplied with the sum of what the block is multiplied with, beside the operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvq.exporter.sources.base import Blocks
from kvq.runtime.native.matrices import BETWEEN

# Parts of the range of a block of fewer than 8 bits that are tried, and places of its zero point around the exact one:
# clipping a little costs less than a coarse grid. What has the least squared error wins.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
SHIFTS = (0, -1, 1)
ROWS_AT_ONCE = 1024  # bounds the memory of quantizing a large matrix


class QuantizedMatrix(NamedTuple):
    """A matrix [n, k] in blocks.

    codes: uint8 [n, blocks, block * held(bits) // 8]; for 4 bits the even element is in the low half.
    scales: float32 [n, blocks].
    zeros: uint8 [n, blocks], codes of zero; None where all are 2^(bits - 1).
    offsets: float32 [n, blocks] that are added to a block's weights; None where there are none.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block: int
    k: int
    zeros: np.ndarray | None = None
    offsets: np.ndarray | None = None

    @property
    def packed_zeros(self) -> np.ndarray | None:
        """The zero points as the operator takes them, uint8 [n, ceil(blocks * held(bits) / 8)]."""
        if self.zeros is None or self.bits != 4:
            return self.zeros
        even = np.zeros((len(self.zeros), -(-self.zeros.shape[1] // 2) * 2), np.uint8)
        even[:, : self.zeros.shape[1]] = self.zeros
        return _packed(even, 4)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """What there is of it, as it is stored: the operator's inputs in their order, and offsets."""
        parts = {"codes": self.codes, "scales": self.scales, "zeros": self.packed_zeros, "offsets": self.offsets}
        return {part: array for part, array in parts.items() if array is not None}

    def dequantize(self) -> np.ndarray:
        """The matrix that is really multiplied with, float32 [n, k]."""
        zeros = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[..., None].astype(np.float32)
        weights = (_unpacked(self.codes, self.bits).astype(np.float32) - zeros) * self.scales[..., None]
        if self.offsets is not None:
            weights += self.offsets[..., None]
        return weights.reshape(len(self.codes), -1)[:, : self.k]


def unpacked_zeros(packed_zeros: np.ndarray, blocks: int, bits: int) -> np.ndarray:
    """Zero points uint8 [n, blocks] of `QuantizedMatrix.packed_zeros`."""
    return _unpacked(packed_zeros, bits)[:, :blocks]


def packed(blocks: Blocks) -> QuantizedMatrix:
    """Blocks of a source in the operator's layout, unchanged.

    An offset is the weight of the middle code, so weights of blocks with minima are off by its rounding to float32 at
    most: by nothing where it has none, as that of a half and 8 times another of its magnitude has.
    """
    n, k = blocks.codes.shape
    codes = blocks.codes.reshape(n, -1, blocks.block)
    offsets = None if blocks.minima is None else blocks.minima + np.float32(blocks.middle) * blocks.scales
    return QuantizedMatrix(_packed(codes, blocks.bits), blocks.scales, blocks.bits, blocks.block, k, offsets=offsets)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [..., an even number] as they are stored."""
    return codes if bits != 4 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    """What `_packed` was given."""
    return codes if bits != 4 else np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def held(bits: int) -> int:
    """Bits that a code takes in a file: the operator knows 4 and 8."""
    return 4 if bits == 4 else 8


def block_for(k: int, largest: int = 64) -> int:
    """Block size for rows of k elements: a power of two from 16 (the operator's least) to `largest`."""
    block = largest
    while block > 16 and block >= 2 * k:
        block //= 2
    return block


def quantize_matrix(matrix: np.ndarray, bits: int, block: int, steps: np.ndarray | None = None) -> QuantizedMatrix:
    """Quantize matrix float32 [n, k] to 4, 5, 6 or 8 bits; k is padded with zeros to whole blocks.

    steps: float32 [n, blocks], another scale that is tried for each block of 8 bits.
    """
    n, k = matrix.shape
    blocks = -(-k // block)
    codes = np.empty((n, blocks, block * held(bits) // 8), np.uint8)
    scales, zeros = np.empty((n, blocks), np.float32), np.empty((n, blocks), np.uint8)
    for at in range(0, n, ROWS_AT_ONCE):
        rows = matrix[at : at + ROWS_AT_ONCE]
        padded = np.zeros((len(rows), blocks * block), np.float32)
        padded[:, :k] = rows
        padded = padded.reshape(len(rows), blocks, block)
        part = slice(at, at + len(rows))
        scales[part], zeros[part] = grid(padded, bits)
        if steps is not None:
            scales[part] = _better(padded, scales[part], steps[part])
        codes[part] = _packed(encode(padded, scales[part, :, None], zeros[part, :, None], bits), bits)
    return QuantizedMatrix(codes, scales, bits, block, k, zeros if bits != 8 else None)


def from_codes(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, k: int) -> QuantizedMatrix:
    """A matrix [n, k] of codes uint8 [n, blocks, block] on grids scales float32 and zeros uint8 [n, blocks]."""
    return QuantizedMatrix(_packed(codes, bits), scales, bits, codes.shape[2], k, zeros if bits != 8 else None)


def grid(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales float32 and zero points uint8 of blocks x float32 [..., block]; a scale is 0 where all of x is."""
    if bits == 8:
        scales = np.abs(x).max(axis=-1) / np.float32(127)
        return scales, np.full(scales.shape, 128, np.uint8)
    best = np.full(x.shape[:-1], np.inf, np.float32)
    scales, zeros = np.zeros_like(best), np.zeros(best.shape, np.uint8)
    for scale, zero in _grids(x, bits):
        codes = encode(x, scale[..., None], zero[..., None], bits)
        error = np.square((codes - zero[..., None]) * scale[..., None] - x).sum(axis=-1)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better]
    return scales, zeros


def _better(x: np.ndarray, scales: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of two scales float32 [...] for blocks x [..., block] in 8 bits those that lose less."""

    def lost(by: np.ndarray) -> np.ndarray:
        codes = encode(x, by[..., None], np.array(128, np.uint8), 8)
        return np.square((codes - np.float32(128)) * by[..., None] - x).sum(axis=-1)

    return np.where(lost(others) < lost(scales), others, scales)


def _grids(x: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points that are tried for blocks x [..., block], float32 [...] each."""
    most, half = (1 << bits) - 1, 1 << (bits - 1)
    low, high = np.minimum(x.min(axis=-1), 0), np.maximum(x.max(axis=-1), 0)
    for factor in FACTORS:
        scale = _stored((high - low) * np.float32(factor / most), bits)
        exact = np.divide(-low * np.float32(factor), scale, out=np.zeros_like(low), where=scale > 0)
        for shift in SHIFTS:
            yield scale, np.clip(np.rint(exact) + shift, 0, most)
    # The plain one: as many steps on both sides but one, which the side of the extreme value has.
    scale = _stored(np.maximum(-low, high) / np.float32(half), bits)
    yield scale, np.where(-low >= high, half, half - 1).astype(np.float32)


def _stored(scales: np.ndarray, bits: int) -> np.ndarray:
    """Scales float32 as a grid of so many bits has them: of 5 and 6 halves, which is how they are kept in memory.

    Those that halves hold badly, or not at all, stay what they are; their matrix then keeps floats.
    """
    if bits not in BETWEEN:
        return scales
    half = np.finfo(np.float16)
    rounded = scales.clip(0, half.max).astype(np.float16).astype(np.float32)
    return np.where((scales >= half.smallest_normal) & (scales <= half.max), rounded, scales)


def encode(x: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes uint8 of x on grids that broadcast with it; the zero point where the scale is 0."""
    quotient = x / np.where(scales == 0, np.float32(np.inf), scales)
    quotient += zeros
    np.rint(quotient, out=quotient)
    np.maximum(quotient, 0, out=quotient)
    return np.minimum(quotient, (1 << bits) - 1, out=quotient).astype(np.uint8)
