"""Quantization that makes up for its own errors (GPTQ, Frantar et al., arXiv 2210.17323).

What rounding a matrix does to its products depends on what it is multiplied with: their squared error is tr(D M D^T),
with D the errors of the weights and M the second moments of the inputs. Columns are quantized one after the other; what
each loses is made up for by those that are still to come, as well as they can.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from kvq.exporter.weights.quantize import QuantizedMatrix, encode, from_codes, grid
from kvq.runtime.errors import CalibrationError
from kvq.runtime.machine.threads import available_cores

# Of the mean second moment, added to each: an input that a calibration text never moves must not be left free.
DAMPING = 0.01
LEAST = 1e-30  # of the mean: inputs that are nothing say nothing
ROWS = 1024  # of a block that are worked on at a time: they stay in a core's cache


def quantize_compensated(matrix: np.ndarray, bits: int, block: int, moments: np.ndarray) -> QuantizedMatrix:
    """Quantize a matrix to 4, 5, 6 or 8 bits so that its products with inputs like those measured change least.

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
    losses = np.empty((block, n), np.float32)
    rows = [slice(at, at + ROWS) for at in range(0, n, ROWS)]  # which have nothing to do with each other
    with ThreadPoolExecutor(available_cores()) as pool:
        for at in range(blocks):
            first, end = at * block, min((at + 1) * block, k)
            lost = losses[: end - first]
            within = partial(
                _quantize_block, weights[first : first + block], spread[first:end, first:end], bits,
                codes[first : first + block], scales[at], zeros[at], lost,
            )  # fmt: skip
            list(pool.map(within, rows))
            weights[end:k] -= spread[first:end, end:].T @ lost
    in_blocks = np.ascontiguousarray(codes.T).reshape(n, blocks, block)
    return from_codes(in_blocks, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), bits, k)


def _quantize_block(
    weights: np.ndarray,
    spread: np.ndarray,
    bits: int,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    losses: np.ndarray,
    rows: slice,
) -> None:
    """Quantize some rows of a block of columns; each of these makes up for those before it.

    Args:
        weights: float32 [block, n], a column a row; those beyond the columns that there are do not count.
        spread: float32 [columns, columns], their part.
        codes, scales, zeros: uint8 [block, n], float32 [n] and uint8 [n], to write.
        losses: float32 [columns, n], to write: what of each column is left to those behind the block.
        rows: which of n.
    """
    held = np.ascontiguousarray(weights[:, rows])
    scale, zero = grid(np.ascontiguousarray(held.T), bits)
    scales[rows], zeros[rows] = scale, zero
    codes[:, rows] = zero  # of what is padded
    middle = zero.astype(np.float32)
    for column in range(len(spread)):
        found = encode(held[column], scale, zero, bits)
        codes[column, rows] = found
        lost = held[column] - (found - middle) * scale
        lost /= spread[column, column]
        losses[column, rows] = lost
        held[column + 1 : len(spread)] -= spread[column, column + 1 :, None] * lost


def _spread(moments: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor float32 [k, k] of the damped moments' inverse: how columns make up for one before them.

    Raises:
        CalibrationError: moments that are no finite numbers.
    """
    damped = np.array(moments, np.float64)
    if not np.isfinite(damped).all():
        raise CalibrationError(
            "what products take is no finite number on the calibration text; give a checkpoint of a trained model"
        )
    if (mean := np.trace(damped) / len(damped)) < LEAST:
        return np.eye(len(damped), dtype=np.float32)
    damped[np.diag_indices_from(damped)] += DAMPING * mean
    # With J the reversal of rows and columns: M = J L L^T J, so M^-1 = U^T U with U = J L^-1 J.
    return np.ascontiguousarray(_inverse_factor(damped[::-1, ::-1])[::-1, ::-1], np.float32)


def _inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """Inverse of the lower Cholesky factor, by halves, so that all the work is in products."""
    size = len(matrix)
    if size <= 64:
        return np.linalg.inv(np.linalg.cholesky(matrix))
    half, inverse = size // 2, np.zeros_like(matrix)
    first = _inverse_factor(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T  # of the factor itself
    second = _inverse_factor(matrix[half:, half:] - below @ below.T)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = -(second @ below) @ first
    return inverse
