"""What changes logits before a token is drawn: penalties for what was said, biases, and processors of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvq.runtime.compute.logits import LARGEST_LOGIT, usable
from kvq.runtime.errors import SamplingError
from kvq.runtime.keywords import is_integer, is_real, real

# processor(all token ids before the new one, logits float32 [vocab]) -> logits float32 [vocab], changed or new.
LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray]
MOST_PENALTY = 100.0
MOST_BIAS = 100.0


class Adjustment:
    """Penalties and biases of one generation, in this order: repetition, presence and frequency, bias.

    Args:
        repetition_penalty: divides positive and multiplies negative logits of tokens anywhere before (Keskar et al.
            2019).
        presence_penalty: taken from the logits of tokens that this generation has said.
        frequency_penalty: taken from them once for every time.
        logit_bias: id -> what is added to its logit.

    Raises:
        SamplingError: a bias is not a number, or not of an id.
    """

    def __init__(
        self,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: Mapping[int, float] | None,
    ) -> None:
        self._repetition = repetition_penalty
        self._presence, self._frequency = presence_penalty, frequency_penalty
        bias = _checked(logit_bias)
        self._biased = np.fromiter(bias, np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._begun: int | None = None  # tokens before the first that is drawn
        self._counted = 0
        self._counts: np.ndarray | None = None  # float32 [vocab], how often this generation has said each

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return self._repetition == 1.0 and not (self._presence or self._frequency or len(self._bias))

    def __call__(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """Changed logits float32 [vocab], in a new array.

        history: all ids before the token that is drawn; of one generation, each time with those drawn since.
        """
        scores = logits.copy()
        if self._repetition != 1.0 and len(history):
            seen = np.unique(np.asarray(history, np.int64))
            found = scores[seen]
            scores[seen] = np.where(found > 0, found / self._repetition, found * self._repetition)
        if self._presence or self._frequency:
            counts = self._count(history, len(logits))
            scores -= self._frequency * counts + self._presence * (counts > 0)
        scores[self._biased] += self._bias
        return scores

    def _count(self, history: Sequence[int], vocab: int) -> np.ndarray:
        if self._begun is None or self._counts is None:
            self._begun = self._counted = len(history)
            self._counts = np.zeros(vocab, np.float32)
        elif len(history) <= self._counted:  # a full context has made room; what went was said all the same
            self._counted = len(history) - 1
        np.add.at(self._counts, np.asarray(history[self._counted :], np.int64), 1)
        self._counted = len(history)
        return self._counts


def _checked(bias: Mapping[int, float] | None) -> dict[int, float]:
    if bias is not None and not isinstance(bias, Mapping):
        raise SamplingError(f"logit_bias must map token ids to numbers, got {bias!r:.60}")
    for token, value in (bias or {}).items():
        if not is_integer(token) or token < 0:
            raise SamplingError(f"logit_bias must map token ids to numbers, got the id {token!r:.60}")
        if not is_real(value) or not -MOST_BIAS <= real(value) <= MOST_BIAS:
            raise SamplingError(
                f"a logit_bias must be a number from -{MOST_BIAS:g} to {MOST_BIAS:g}, got {value!r:.60}"
            )
    return {int(token): float(value) for token, value in (bias or {}).items()}


def processed(processors: Sequence[LogitsProcessor], history: Sequence[int], logits: np.ndarray) -> np.ndarray:
    """Logits float32 [vocab] as the caller's processors leave them, each with what the one before it left.

    Raises:
        SamplingError: one gives something else than logits.
    """
    found = logits.copy()  # what they change is theirs
    for processor in processors:
        found = _floats(given := processor(history, found))
        if found.shape != logits.shape or not _drawable(found):
            raise SamplingError(
                f"a logits processor must give float32 [{len(logits)}], numbers up to {LARGEST_LOGIT:g} or -inf, of"
                f" which not all are -inf, got {given!r:.60}"
            )
    return found


def _floats(given: object) -> np.ndarray:
    """What a processor gave, as float32; empty if it is nothing of the kind."""
    try:
        with np.errstate(over="ignore"):  # of larger floats: infinite, and refused
            return np.asarray(given, np.float32)
    except (TypeError, ValueError, OverflowError):
        return np.empty(0, np.float32)


def _drawable(logits: np.ndarray) -> bool:
    """Whether a token can be drawn of logits, of which some may be -inf."""
    numbers = logits[logits != -np.inf]
    return numbers.size > 0 and usable(numbers)
