"""How a code of a channel makes up for the rounding of the channels before it, per layer and KV head.

A score is the product of a key with a query, so an error e of a key costs e^T S e, with S the second moment of the
queries that attend to keys beyond the recent window. Channels of S are far from independent: what rounding channel i
did wrong can be taken from the channels behind it, so that queries see little of both. With U the upper Cholesky
factor of the inverse, S^-1 = U^T U, the best share that channel j takes of channel i's error is U_ij / U_ii. This is
rounding with error feedback, as GPTQ does it to weights (Frantar et al., 2022), here of every key as it is stored:
bytes and readers stay the same.
"""

from __future__ import annotations

import numpy as np

from kvq.exporter.key_basis import KeyBasis
from kvq.exporter.key_statistics import KeyStatistics

# Share of the mean second moment added to all axes: without it, what the text did not ask about would take all errors.
DAMPING = 0.5
MOST = 8.0  # of a share; honest ones are below 1


def key_feedback(statistics: KeyStatistics, basis: KeyBasis, rotation: np.ndarray) -> np.ndarray:
    """What `kvq.runtime.bundle.bundle.Bundle.key_feedback` reads: float16 [layers, kv_heads, head_dim, head_dim].

    Args:
        statistics: of rotated queries and keys.
        basis: that keys will be in.
        rotation: [head_dim, head_dim], orthonormal, that follows.
    """
    weight = np.maximum(statistics.weight, 1e-30)[..., None, None]
    # Rotated q is q R, as a row; queries undergo the inverse of what keys do.
    inverse = np.linalg.inv(rotation.T @ basis.matrices() @ rotation)
    return feedback_of(inverse.swapaxes(-1, -2) @ (statistics.queries / weight) @ inverse)


def feedback_of(moments: np.ndarray) -> np.ndarray:
    """Shares for second moments [..., d, d] of what multiplies errors: float16 [..., d, d], 0 but for j > i."""
    d = moments.shape[-1]
    mean = np.trace(moments, axis1=-2, axis2=-1)[..., None, None] / d
    damped = np.where(mean > 0, moments / np.where(mean > 0, mean, 1), 0) + DAMPING * np.eye(d)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).swapaxes(-1, -2)
    shares = np.triu(upper / np.diagonal(upper, axis1=-2, axis2=-1)[..., None], 1)
    return np.clip(shares, -MOST, MOST).astype(np.float16)
