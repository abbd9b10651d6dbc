"""The policy interface: the one seam between the runtime and whatever decides the precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from kvq.runtime.errors import PolicyError
from kvq.runtime.precision.table import Pair

# What a session is made with where neither policy nor budget is named: the fewest bits whose difference to the exact
# cache is noise, docs/decisions.md.
DEFAULT_POLICY = "int8"


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
    """Chooses a pair of precisions, of keys and of values, for every token.

    A choice may depend on a token's own features and position only. A policy keeps no state
    between calls, so sessions can be trimmed, forked and resumed at any token.

    Attributes:
        name: what the user typed, reported by `stats()`.
        needs: the features to compute, a subset of `FEATURE_NAMES`; what is not needed costs nothing.
        classes: uint8 [classes, 2], every `Pair` it may choose; None may be any. Bounds on memory rest on it.
        reads: names of the fields of `TokenFeatures` it looks at, if it would rather be asked about many tokens at
            once: then a session keeps these fields of decoded tokens, and asks when the first of them leaves the
            recent window. None is asked at every step.
        recipe: name and options that `make_policy` makes the same policy of, where it has made this one.
        reason, note: why it is this one though nobody named it, in short and as a sentence with a remedy, where a user
            should know; else empty.
    """

    name: str
    needs: frozenset[str] = frozenset()
    classes: np.ndarray | None = None
    reads: frozenset[str] | None = None
    recipe: tuple[str, dict[str, Any]] | None = None
    reason: str = ""
    note: str = ""

    @abstractmethod
    def choose(self, features: TokenFeatures) -> np.ndarray:
        """Precisions of each token, uint8 [tokens, 2]: ids of those of its keys and its values. The ids 2, 4, 8 and 16
        are the codecs of so many bits."""


def protect_bits_for(policy: Policy, kv_bits: float | None = None) -> int:
    """Bits of the protected tokens of window and sink where nobody names them.

    16 where the policy stores the keys or the values of every token at 8 bits or more, may choose anything, or has a
    budget of more than 8 bits a value: what is protected is to be finer than the rest, and what has gone through a
    window of 8 bits is no finer than that. Else 8, whose difference to 16 is noise beside the rest (docs/decisions.md).
    """
    if policy.classes is None or (isinstance(kv_bits, int | float) and kv_bits > 8):
        return 16
    bits = np.array([Pair(int(k), int(v)).bits for k, v in policy.classes])
    return 16 if (bits.min(axis=0) >= 8).any() else 8


class ScoredPolicy(Policy):
    """A policy that ranks its classes by a score, so that a byte budget can shift its choices.

    Left alone it takes the class of the highest score. Under a budget the session takes
    argmax_k (score_k - mu * bytes_k), see `kvq.runtime.policy.budget`.

    Attributes:
        classes: uint8 [classes, 2], the `Pair` of each class, in the order of the scores.
    """

    classes: np.ndarray

    @abstractmethod
    def score(self, features: TokenFeatures) -> np.ndarray:
        """Scores float32 [tokens, classes], like log-probabilities: only differences within a row matter."""

    @abstractmethod
    def curve(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a price costs on typical text.

        Args:
            nbytes: [classes], bytes of a token in each class.

        Returns:
            Mean bytes a token, ascending, and the price mu that leads to them; float64 [points] each.
        """

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return self.classes[self.score(features).argmax(axis=1)]


# Points of a curve, and tokens it is measured on.
CURVE_POINTS, CURVE_TOKENS = 160, 20_000


def curve_of(scores: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve of `ScoredPolicy.curve` from scores [tokens, classes] of typical tokens.

    Damages are heavy-tailed, so just above the cheapest class a small difference in bytes is a large
    one in price: points lie closer and closer together there.
    """
    scores = np.asarray(scores, np.float64)[:: max(1, len(scores) // CURVE_TOKENS)]
    # A choice between two classes changes at one price; between these prices nothing happens.
    prices = [np.array([0.0])]
    for i in range(len(nbytes)):
        for j in range(len(nbytes)):
            if nbytes[i] < nbytes[j]:
                with np.errstate(invalid="ignore"):  # two classes that are never chosen have no price between them
                    prices.append((scores[:, j] - scores[:, i]) / (nbytes[j] - nbytes[i]))
    steps = np.unique(np.concatenate(prices))
    steps = steps[np.isfinite(steps)]
    margin = 1e-6 * max(1e-12, np.abs(steps).max())
    grid = np.concatenate([[steps[0] - margin], (steps[1:] + steps[:-1]) / 2, [steps[-1] + margin]])

    def mean(mu: float) -> float:
        return float(nbytes[(scores - mu * nbytes).argmax(1)].mean())

    lowest, highest = mean(grid[-1]), mean(grid[0])
    found = {lowest: float(grid[-1]), highest: float(grid[0])}
    for target in lowest + (highest - lowest) * np.geomspace(1e-4, 1, CURVE_POINTS)[:-1]:
        low, high = 0, len(grid) - 1  # the mean falls along the grid
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if mean(grid[middle]) > target else (low, middle)
        found[mean(grid[high])] = float(grid[high])
    means = np.array(sorted(found))
    return means, np.array([found[m] for m in means])
