"""The rule-based baseline: hand-written thresholds on the token features."""

from __future__ import annotations

import numpy as np

from kvq.runtime.policy.base import ScoredPolicy, TokenFeatures, curve_of
from kvq.runtime.precision.table import EXACT, named


class RulePolicy(ScoredPolicy):
    """2, 4 or 8 bits by a count of three signs that a token will be read again.

    Each sign that holds raises the token one step on the ladder k3v3, k4v4, k8v4, k8v8:

    * **focus**: its own attention row is concentrated. The squared coefficient of variation of
      the row, V * n^2 for a row of n weights with variance V, is free of the row's length.
    * **common**: its id is frequent so far. Separators and function words serve as anchors that
      later tokens attend to (the opposite of the paper's argument; rare words measured worse
      than random).
    * **early**: it stands near the beginning, so more tokens read it.

    The thresholds were set on the embedded model (8 held-out texts of 1,024 tokens): focus and
    common hold for about a third of the tokens each.
    """

    name = "rule"
    needs = frozenset({"attention_variance", "rarity"})
    reads = needs

    FOCUS = 200.0
    COMMON_NATS = 4.9
    EARLY_TOKENS = 64
    # The ends: budgets only.
    classes = np.array([named("2"), named("3"), named("4"), named("8", "4"), named("8"), EXACT], np.uint8)
    # Share of tokens with 0, 1, 2, 3 signs, measured on the same texts.
    SHARES = (0.5, 0.35, 0.13, 0.02)

    def score(self, features: TokenFeatures) -> np.ndarray:
        """Minus the squared distance, in steps, from the class the signs point at."""
        row_length = features.positions + 1
        focus = features.get("attention_variance") * row_length.astype(np.float32) ** 2 > self.FOCUS
        common = features.get("rarity") < self.COMMON_NATS
        early = features.positions < self.EARLY_TOKENS
        return self._distances(focus.astype(int) + common + early)

    def _distances(self, signs: np.ndarray) -> np.ndarray:
        steps = np.arange(len(self.classes)) - (1 + signs[:, None])
        return -np.square(steps).astype(np.float32)

    def curve(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        signs = np.repeat(np.arange(4), np.rint(100 * np.array(self.SHARES)).astype(int))
        return curve_of(self._distances(signs), nbytes)


POLICIES = {"rule": RulePolicy}
