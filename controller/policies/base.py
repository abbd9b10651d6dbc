"""The policy interface: the one seam between the runtime and whatever decides the precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from kvq.runtime.errors import PolicyError


class TokenFeatures(NamedTuple):
    """What is known about tokens when their precision is chosen; float32 [tokens] each.

    A feature the policy did not ask for is None. Formulas after arXiv 2604.04722, section 3.
    What the forward pass leaves behind anyway (`ids` and below) is always there, as views that the
    next pass overwrites.
    """

    positions: np.ndarray  # int64 [tokens], place in the text, from 0
    entropy: np.ndarray | None = None  # nats, of the next-token distribution at the token
    rarity: np.ndarray | None = None  # -log of the smoothed running frequency of the token's id
    attention_variance: np.ndarray | None = None  # of the last layer's attention row, mean over heads
    confidence: np.ndarray | None = None  # max probability of the next-token distribution
    ids: np.ndarray | None = None  # int64 [tokens]
    residual: np.ndarray | None = None  # float32 [tokens, hidden], what the head takes
    keys: np.ndarray | None = None  # float32 [layers, kv_heads, tokens, head_dim], rotated and centred
    values: np.ndarray | None = None  # likewise, rotated

    def get(self, name: str) -> np.ndarray:
        """A feature that the policy has declared in `needs`.

        Raises:
            PolicyError: it was not declared, so it was not computed.
        """
        values = getattr(self, name)
        if values is None:
            raise PolicyError(f"the policy reads {name!r} but does not declare it; add it to its `needs`")
        return values


FEATURE_NAMES = TokenFeatures._fields[1:5]


class Policy(ABC):
    """Chooses (key bits, value bits) for every token.

    A choice may depend on a token's own features and position only. A policy keeps no state
    between calls, so sessions can be trimmed, forked and resumed at any token.

    Attributes:
        name: what the user typed, reported by `stats()`.
        needs: the features to compute, a subset of `FEATURE_NAMES`; what is not needed costs nothing.
    """

    name: str
    needs: frozenset[str] = frozenset()

    @abstractmethod
    def choose(self, features: TokenFeatures) -> np.ndarray:
        """Bits of each token, uint8 [tokens, 2]: key bits and value bits, each in {2, 4, 8, 16}."""


class ScoredPolicy(Policy):
    """A policy that ranks its classes by a score, so that a byte budget can shift its choices.

    Left alone it takes the class of the highest score. Under a budget the session takes
    argmax_k (score_k - mu * bytes_k), see `kvq.controller.budget`.

    Attributes:
        classes: uint8 [classes, 2], key and value bits of each class.
    """

    classes: np.ndarray

    @abstractmethod
    def score(self, features: TokenFeatures) -> np.ndarray:
        """Scores float32 [tokens, classes], like log-probabilities: only differences within a row matter."""

    @abstractmethod
    def typical_scores(self) -> np.ndarray:
        """Scores float32 [n, classes] of typical tokens: from them follows what a price mu costs."""

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return self.classes[self.score(features).argmax(axis=1)]
