"""Orthonormal rotations that spread outlier channels before something is quantized (QuaRot, arXiv 2404.00456).

Of attention heads: scores do not change when queries and keys are rotated alike, and the rotation of values is undone
inside the output projection. Queries and keys are rotated in the graph, after the rotary embedding; values in the
weights, at no cost.

Of what a product takes: its matrix is rotated alike, in blocks, so nothing changes but what the rounding of the
activations, block by block, makes of a few large channels.
"""

from __future__ import annotations

import numpy as np


def hadamard(n: int) -> np.ndarray:
    """Orthonormal Hadamard matrix of Sylvester's construction, float32 [n, n]; symmetric, its own inverse.

    Raises:
        ValueError: n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"Hadamard matrices are built for powers of two, not {n}")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(n)).astype(np.float32)


def head_rotation(head_dim: int, wanted: bool = True) -> tuple[str, np.ndarray]:
    """Name and matrix float32 [head_dim, head_dim] of a head's rotation; the identity where none exists."""
    if wanted and not head_dim & (head_dim - 1):
        return "hadamard", hadamard(head_dim)
    return "none", np.eye(head_dim, dtype=np.float32)


# Elements of a block of activations that is rotated: as many as share a scale in a product.
LARGEST_BLOCK, LEAST_BLOCK = 64, 16


def activation_block(features: int) -> int:
    """Size of the blocks in which a product's input is rotated, a power of two; 0 where too few divide its features."""
    block = min(LARGEST_BLOCK, features & -features)
    return block if block >= LEAST_BLOCK else 0


def rotate_outputs(weight: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rotate what a projection yields, head by head: weight or bias [heads * head_dim, ...]."""
    heads = weight.reshape(-1, len(rotation), *weight.shape[1:])
    return np.einsum("ij,hj...->hi...", rotation, heads).reshape(weight.shape)


def rotate_inputs(weight: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Undo the rotation of what a projection takes, block by block: weight [out, blocks * len(rotation)]."""
    heads = weight.reshape(len(weight), -1, len(rotation))
    return (heads @ rotation.T).reshape(weight.shape)
