"""Which logits can be calculated with; without onnxruntime, which `kvq --help` does without."""

from __future__ import annotations

import numpy as np

from kvq.runtime.errors import NonFiniteError

# Of a logit: far above any model's. Penalties multiply it by a hundred, and differences of two are taken; with more,
# single precision would overflow in them, and a draw be one among NaN.
LARGEST_LOGIT = 1e30


def usable(logits: np.ndarray) -> bool:
    """Whether all logits, float32 of any shape but an empty one, can be calculated with: none is NaN or beyond
    `LARGEST_LOGIT`.
    """
    return bool(logits.min() >= -LARGEST_LOGIT and logits.max() <= LARGEST_LOGIT)  # of NaN either is false


def not_usable() -> NonFiniteError:
    """What is said where they are not."""
    return NonFiniteError(
        f"the model produced NaN, infinite or huge logits (beyond {LARGEST_LOGIT:g}); check the checkpoint, or export"
        " with fp32"
    )
