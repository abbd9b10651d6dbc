"""Policies that mix precisions without looking at the token: the control group."""

from __future__ import annotations

import numpy as np

from kvq.runtime.errors import PolicyError
from kvq.runtime.policy.base import Policy, ScoredPolicy, TokenFeatures, curve_of
from kvq.runtime.precision.table import EXACT, named
from kvq.runtime.session.sampling import uniform

CLASSES = np.array([EXACT, named("8"), named("4"), named("2")], np.uint8)  # those of arXiv 2604.04722


class MixedPolicy(Policy):
    """A fixed cycle 16, 8, 4, 2 over the positions: every precision in use, for tests and demos."""

    name = "mixed"
    reads = frozenset()
    classes = CLASSES

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return CLASSES[features.positions % len(CLASSES)]


class RandomPolicy(ScoredPolicy):
    """A class drawn for each position, independent of the text.

    Any policy worth its features must beat this one at equal bytes.

    Args:
        weights: of 16, 8, 4 and 2 bits; four numbers, none negative, normalised here.
        seed: in [0, 2^64); the same seed gives the same draw for a position, whatever was drawn before.

    Raises:
        PolicyError: weights or seed are not of that kind.
    """

    name = "random"
    reads = frozenset()
    classes = CLASSES

    def __init__(self, weights: tuple[float, float, float, float] = (1, 1, 1, 1), seed: int = 0) -> None:
        try:
            shares = np.asarray(weights, float)
        except (TypeError, ValueError, OverflowError):
            shares = np.zeros(0)
        if shares.shape != (len(CLASSES),) or not np.isfinite(shares).all() or shares.min() < 0 or not shares.any():
            raise PolicyError(f"weights must be four positive numbers (of 16, 8, 4, 2 bits), got {weights!r:.60}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
            raise PolicyError(f"seed must be an integer in [0, 2^64), got {seed!r:.60}")
        shares = shares / shares.max()  # a sum of the largest numbers would be infinite
        with np.errstate(divide="ignore"):
            self.logarithms = np.log(shares / shares.sum())
        self.seed = int(seed)

    def score(self, features: TokenFeatures) -> np.ndarray:
        """log of the weight plus Gumbel noise: the largest is a draw by weight, whatever the prices."""
        places = np.asarray(features.positions)[:, None] * len(CLASSES) + np.arange(len(CLASSES))
        noise = uniform(places, self.seed) + 2.0**-54  # never zero
        return (self.logarithms - np.log(-np.log(noise))).astype(np.float32)

    def curve(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return curve_of(self.score(TokenFeatures(np.arange(4096))), nbytes)


POLICIES = {"mixed": MixedPolicy, "random": RandomPolicy}
