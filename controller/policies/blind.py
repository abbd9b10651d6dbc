"""Policies that mix precisions without looking at the token: the control group."""

from __future__ import annotations

import numpy as np

from kvq.controller.policies.base import Policy, ScoredPolicy, TokenFeatures, curve_of
from kvq.runtime.errors import PolicyError

CLASSES = np.array([(16, 16), (8, 8), (4, 4), (2, 2)], np.uint8)  # those of arXiv 2604.04722


class MixedPolicy(Policy):
    """A fixed cycle 16, 8, 4, 2 over the positions: every precision in use, for tests and demos."""

    name = "mixed"
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
    classes = CLASSES

    def __init__(self, weights: tuple[float, float, float, float] = (1, 1, 1, 1), seed: int = 0) -> None:
        try:
            shares = np.asarray(weights, float)
        except (TypeError, ValueError):
            shares = np.zeros(0)
        if shares.shape != (len(CLASSES),) or not np.isfinite(shares).all() or shares.min() < 0 or not shares.sum():
            raise PolicyError(f"weights must be four positive numbers (of 16, 8, 4, 2 bits), got {weights!r}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
            raise PolicyError(f"seed must be an integer in [0, 2^64), got {seed!r}")
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


def uniform(positions: np.ndarray, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 of the positions' shape, a pure function of (seed, position).

    SplitMix64 (Steele, Lea, Flood 2014): a counter-based generator needs no state to save.
    """
    z = positions.astype(np.uint64) + np.uint64((seed * 0xD1342543DE82EF95 + 1) & (1 << 64) - 1)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


POLICIES = {"mixed": MixedPolicy, "random": RandomPolicy}
