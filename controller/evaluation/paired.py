"""Paired comparisons: 95 % bootstrap intervals over what was measured in both arms."""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
# Units of which an interval says something. Of five differences all have one sign by chance in one case of sixteen, and
# what is drawn from them then leaves out zero.
FEWEST = 6


def interval(
    values: np.ndarray, weights: np.ndarray | None = None, rng: np.random.Generator | None = None
) -> dict[str, float]:
    """A mean with its interval.

    Args:
        values: float [units]: differences of two arms, by text, item or document.
        weights: float [units]; then it is the sum of the values over that of the weights, which must not be zero.
        rng: draws the resamples; None is the same one every time.

    Returns:
        "mean", "low", "high".
    """
    drawn = (rng or np.random.default_rng(0)).integers(0, len(values), (RESAMPLES, len(values)))
    if weights is None:
        mean, means = values.mean(), values[drawn].mean(1)
    else:
        mean = values.sum() / weights.sum()
        total = weights[drawn].sum(1)
        means = values[drawn].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(mean), "low": float(low), "high": float(high)}
