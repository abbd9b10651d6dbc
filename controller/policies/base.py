"""The policy interface: the one seam between the runtime and whatever decides the precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from kvq.runtime.errors import PolicyError


class TokenFeatures(NamedTuple):
    """What is known about tokens when their precision is chosen; float32 [tokens] each.

    A feature the policy did not ask for is None. Formulas after arXiv 2604.04722, section 3.
    """

    positions: np.ndarray  # int64 [tokens], place in the text, from 0
    entropy: np.ndarray | None = None  # nats, of the next-token distribution at the token
    rarity: np.ndarray | None = None  # -log of the smoothed running frequency of the token's id
    attention_variance: np.ndarray | None = None  # of the last layer's attention row, mean over heads
    confidence: np.ndarray | None = None  # max probability of the next-token distribution

    def get(self, name: str) -> np.ndarray:
        """A feature that the policy has declared in `needs`.

        Raises:
            PolicyError: it was not declared, so it was not computed.
        """
        values = getattr(self, name)
        if values is None:
            raise PolicyError(f"the policy reads {name!r} but does not declare it; add it to its `needs`")
        return values


FEATURE_NAMES = TokenFeatures._fields[1:]


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
