"""Quantization that makes up for its own errors (GPTQ, Frantar et al., arXiv 2210.17323).

What rounding a matrix does to its products depends on what it is multiplied with: their squared error is tr(D M D^T),
with D the errors of the weights and M the second moments of the inputs. Columns are quantized one after the other; what
each loses is made up for by those that are still to come, as well as they can.
"""

from __future__ import annotations

import numpy as np

from kvq.exporter.weights.quantize import QuantizedMatrix, encode, from_codes, grid

# Of the mean second moment, added to each: an input that a calibration text never moves must not be left free.
DAMPING = 0.01


def quantize_compensated(matrix: np.ndarray, bits: int, block: int, moments: np.ndarray) -> QuantizedMatrix:
    """Quantize a matrix to 4 or 8 bits so that its products with inputs like those measured change least.

    Args:
        matrix: float32 [n, k].
        block: elements per scale.
        moments: float64 [k, k], sums of products of inputs; not all zero.
    """
    n, k = matrix.shape
    blocks = -(-k // block)
    weights = np.zeros((blocks * block, n), np.float32)  # of a column, what all rows hold lies side by side
    weights[:k] = matrix.T
    spread = _spread(moments)
    codes = np.empty((blocks * block, n), np.uint8)
    scales, zeros = np.empty((blocks, n), np.float32), np.empty((blocks, n), np.uint8)
    for at in range(blocks):
        first, end = at * block, min((at + 1) * block, k)
        scales[at], zeros[at] = grid(np.ascontiguousarray(weights[first : first + block].T), bits)
        codes[first : first + block] = zeros[at]  # of what is padded
        losses = np.empty((end - first, n), np.float32)
        for column in range(first, end):
            found = encode(weights[column], scales[at], zeros[at], bits)
            codes[column] = found
            lost = weights[column] - (found - zeros[at].astype(np.float32)) * scales[at]
            lost /= spread[column, column]
            losses[column - first] = lost
            weights[column + 1 : end] -= spread[column, column + 1 : end, None] * lost
        weights[end:k] -= spread[first:end, end:].T @ losses
    in_blocks = np.ascontiguousarray(codes.T).reshape(n, blocks, block)
    return from_codes(in_blocks, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), bits, k)


def _spread(moments: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor float32 [k, k] of the damped moments' inverse: how columns make up for one before them."""
    damped = np.array(moments, np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.trace(damped) / len(damped)
    # With J the reversal of rows and columns: M = J L L^T J, so M^-1 = U^T U with U = J L^-1 J.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.ascontiguousarray(_inverse_of_lower(lower)[::-1, ::-1], np.float32)


def _inverse_of_lower(lower: np.ndarray) -> np.ndarray:
    """Inverse of a lower triangular matrix, halves at a time, so that all the work is in products."""
    size = len(lower)
    if size <= 64:
        return np.linalg.inv(lower)
    half, inverse = size // 2, np.zeros_like(lower)
    inverse[:half, :half] = _inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ lower[half:, :half] @ inverse[:half, :half]
    return inverse
