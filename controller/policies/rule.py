"""The rule-based baseline: hand-written thresholds on the token features."""

from __future__ import annotations

import numpy as np

from kvq.controller.policies.base import Policy, TokenFeatures


class RulePolicy(Policy):
    """2, 4 or 8 bits by a count of three signs that a token will be read again.

    Each sign that holds raises the token one step on the ladder k4v2, k4v4, k8v4, k8v8:

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

    FOCUS = 200.0
    COMMON_NATS = 4.9
    EARLY_TOKENS = 64
    LADDER = np.array([(4, 2), (4, 4), (8, 4), (8, 8)], np.uint8)

    def choose(self, features: TokenFeatures) -> np.ndarray:
        row_length = features.positions + 1
        focus = features.get("attention_variance") * row_length.astype(np.float32) ** 2 > self.FOCUS
        common = features.get("rarity") < self.COMMON_NATS
        early = features.positions < self.EARLY_TOKENS
        return self.LADDER[focus.astype(int) + common + early]


POLICIES = {"rule": RulePolicy}
