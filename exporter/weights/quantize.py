"""Block quantization of weight matrices in the layout of onnxruntime's MatMulNBits.

A row of a matrix [n, k] is cut into blocks; each block has one float32 scale and unsigned codes
around a zero point in the middle: weight = (code - 2^(bits-1)) * scale. Contract:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvq.exporter.sources.base import Blocks

# Scales tried for a 4-bit block, relative to mapping its extreme value to the extreme code:
# clipping a little costs less than a coarse grid. The one with the least squared error wins.
FOUR_BIT_FACTORS = (1.0, 0.93, 0.86, 1.07, 1.14)
ROWS_AT_ONCE = 1024  # bounds the memory of quantizing a large matrix


class QuantizedMatrix(NamedTuple):
    """A matrix [n, k] in blocks.

    codes: uint8 [n, blocks, block * bits // 8]; for 4 bits the even element is in the low half.
    scales: float32 [n, blocks].
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block: int
    k: int

    def dequantize(self) -> np.ndarray:
        """The matrix that is really multiplied with, float32 [n, k]."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        weights = (codes.astype(np.float32) - (1 << (self.bits - 1))) * self.scales[..., None]
        return weights.reshape(len(codes), -1)[:, : self.k]


def packed(blocks: Blocks) -> QuantizedMatrix:
    """Blocks of a source in the operator's layout, unchanged."""
    n, k = blocks.codes.shape
    codes = blocks.codes.reshape(n, -1, blocks.block)
    return QuantizedMatrix(_packed(codes, blocks.bits), blocks.scales, blocks.bits, blocks.block, k)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [n, blocks, block] as they are stored."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def block_for(k: int, largest: int = 64) -> int:
    """Block size for rows of k elements: a power of two from 16 (the operator's least) to `largest`."""
    block = largest
    while block > 16 and block >= 2 * k:
        block //= 2
    return block


def quantize_matrix(matrix: np.ndarray, bits: int, block: int) -> QuantizedMatrix:
    """Quantize matrix float32 [n, k] to 4 or 8 bits; k is padded with zeros to whole blocks."""
    n, k = matrix.shape
    blocks = -(-k // block)
    codes = np.empty((n, blocks, block * bits // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    for at in range(0, n, ROWS_AT_ONCE):
        rows = matrix[at : at + ROWS_AT_ONCE]
        padded = np.zeros((len(rows), blocks * block), np.float32)
        padded[:, :k] = rows
        part = slice(at, at + len(rows))
        codes[part], scales[part] = _quantize_blocks(padded.reshape(len(rows), blocks, block), bits)
    return QuantizedMatrix(codes, scales, bits, block, k)


def _quantize_blocks(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [n, blocks, block * bits // 8] and scales float32 [n, blocks] of x [n, blocks, block]."""
    zero = 1 << (bits - 1)
    if bits == 8:
        scale = np.abs(x).max(axis=-1) / np.float32(127)
        return (_round(x, scale, zero) + zero).astype(np.uint8), scale
    # The extreme value goes to -8, which exists, rather than to 7: scales may be negative.
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    best = np.full(extreme.shape, np.inf, np.float32)
    scale = np.zeros_like(extreme)
    for factor in FOUR_BIT_FACTORS:
        candidate = extreme * np.float32(factor / -zero)
        error = np.square(_round(x, candidate, zero) * candidate[..., None] - x).sum(axis=-1)
        better = error < best
        best[better], scale[better] = error[better], candidate[better]
    codes = (_round(x, scale, zero) + zero).astype(np.uint8)
    return _packed(codes, bits), scale


def _round(x: np.ndarray, scale: np.ndarray, zero: int) -> np.ndarray:
    """Nearest code of x / scale in [-zero, zero - 1], float32 of x's shape; zero where the scale is zero."""
    scale = scale[..., None]
    quotient = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
    return np.clip(np.rint(quotient), -zero, zero - 1)
