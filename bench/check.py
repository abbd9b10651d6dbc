"""Whether an arm computes what it is said to, before its speed is printed.

Each arm is fed the same 64 random tokens at once and 8 more one by one; the nine rows of logits are
compared with its reference on the numpy backend: for a kvq arm the same policy, for the others kvq's
16-bit policy. The measure is relative: root mean square of the difference over the standard
deviation of the reference's logits; two unrelated sets of logits differ by 1.4.

Products with quantized activations amplify: a difference of 1e-6 moves some activations to the next
code, and after 30 layers of random weights logits differ by 0.05 to 0.1. Arms that can keep
activations in float32 are therefore checked that way, to a tight tolerance.
"""

from __future__ import annotations

import numpy as np

PROMPT, STEPS = 64, 8  # tokens


def check_ids(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt int64 [PROMPT] and decode steps int64 [STEPS]."""
    ids = np.random.default_rng(7).integers(0, vocab, PROMPT + STEPS)
    return ids[:PROMPT], ids[PROMPT:]


def relative_difference(logits: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square difference of float32 [rows, vocab] over the reference's standard deviation."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        return float("inf")
    centred = reference - reference.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.square(logits - reference).mean() / np.square(centred).mean()))


def same_top(logits: np.ndarray, reference: np.ndarray) -> float:
    """Share of rows whose largest logit is the same."""
    return float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean())
