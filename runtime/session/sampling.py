"""Sampling: a closure from logits and history to the next token."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from kvq.runtime.errors import SamplingError
from kvq.runtime.keywords import is_integer, is_real
from kvq.runtime.session.adjusting import MOST_PENALTY, Adjustment, LogitsProcessor, processed

# sampler(logits float32 [vocab], all token ids before the new one) -> (token, its log-probability in nats)
Sampler = Callable[[np.ndarray, Sequence[int]], tuple[int, float]]

FOLDS = 128  # rows that scores are laid in, to find the largest ones
NUCLEUS = 256  # tokens that are looked at first for top-p

# Keeps the draws apart from those of `random` policies, which come from the same generator.
SAMPLING_STREAM = 0x6B76712D74657874  # "kvq-text"


class SamplingOptions(TypedDict, total=False):
    """The keyword options of `make_sampler`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None


# What `generate` and kvq-run do when neither told otherwise nor by the model; a bare `make_sampler` filters nothing.
DEFAULTS: SamplingOptions = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "seed": None,
}


def make_sampler(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    processors: Sequence[LogitsProcessor] = (),
    mask: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Sampler:
    """Build a sampler, for one generation. In this order: processors, penalties, bias, mask, temperature, top-k,
    top-p, min-p.

    Args:
        temperature: divides the logits; 0 is greedy decoding.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach p (Holtzman et al. 2020).
        min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024).
        repetition_penalty: divide positive and multiply negative logits of tokens in the history
            (Keskar et al. 2019); 1 leaves them alone; from 0.01 to 100.
        presence_penalty: what the logit of a token loses that this sampler has drawn before, in nats.
        frequency_penalty: the same for every time that it has.
        logit_bias: token id -> what is added to its logit, from -100 to 100; None for nothing.
        seed: decides every draw, together with the place in the text (the number of tokens before it); its last 64
            bits count, None draws one. So a text continues alike whether or not its session was saved in between.
        processors: the caller's own, each called with the ids before the token and logits float32 [vocab] that it may
            change; they return logits.
        mask: puts -inf where a token cannot come; a function of logits float32 [vocab].

    The log-probability returned is the model's own: of the raw logits, before any of this.

    Raises:
        SamplingError: an option is out of its range.
    """
    _check_options(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed)
    temperature, top_p, min_p, top_k = float(temperature), float(top_p), float(min_p), int(top_k)  # of any type
    stream = (secrets.randbits(64) if seed is None else int(seed)) ^ SAMPLING_STREAM
    adjust = Adjustment(float(repetition_penalty), float(presence_penalty), float(frequency_penalty), logit_bias)
    room = np.empty(0, np.float32)  # of a vocabulary's size, made once

    def sample(logits: np.ndarray, history: Sequence[int]) -> tuple[int, float]:
        nonlocal room
        scores = processed(processors, history, logits) if processors else logits
        if not adjust.idle:
            scores = adjust(scores, history)
        if mask is not None:
            scores = mask(scores)
        if temperature == 0:
            token = int(scores.argmax())
        else:
            token = _draw(scores, temperature, uniform_at(len(history), stream), top_k, top_p, min_p)
        if room.shape != logits.shape or room.dtype != logits.dtype:
            room = np.empty(logits.shape, logits.dtype)
        return token, log_probability(logits, token, room)

    return sample


class Scored(NamedTuple):
    """A token id and its log-probability under the model, in nats."""

    token: int
    logprob: float


def log_probability(logits: np.ndarray, token: int, room: np.ndarray | None = None) -> float:
    """log softmax(logits)[token] in nats; room: an array like the logits, overwritten."""
    peak = logits.max()
    weights = np.subtract(logits, peak, out=room)
    return float(logits[token] - peak - np.log(np.exp(weights, out=weights).sum()))


def most_likely(logits: np.ndarray, count: int) -> list[Scored]:
    """The `count` most likely next tokens, best first, ties by id; logits float32 [vocab]."""
    if not count:
        return []
    candidates = largest(logits, count)
    best = candidates[np.lexsort((candidates, -logits[candidates]))][:count]
    peak = logits.max()
    total = np.log(np.exp(logits - peak).sum())
    return [Scored(int(token), float(logits[token] - peak - total)) for token in best]


def _draw(scores: np.ndarray, temperature: float, point: float, top_k: int, top_p: float, min_p: float) -> int:
    """Draw from softmax(scores / temperature) after the filters, by a point in [0, 1) on the cumulative weights.

    scores: float [vocab]. The most likely token always survives.
    """
    limited = 0 < top_k < len(scores)
    candidates = largest(scores, top_k if limited else len(scores))
    kept = scores[candidates] if limited else scores
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature sends all but the best to -inf
        kept = (kept.astype(np.float64) - kept.max()) / temperature
        weights = np.exp(kept)
    if limited or top_p < 1.0:
        total = weights.sum()
        if not limited:
            candidates = _nucleus(weights, top_p * total)
            kept, weights = kept[candidates], weights[candidates]
        # Most likely first, ties by id, so that a seed means the same on every machine.
        order = np.lexsort((candidates, -kept))[: top_k or None]
        candidates, weights = candidates[order], weights[order]
        if limited:
            total = weights.sum()  # less what was as likely as the last one that is kept
        if top_p < 1.0:
            reached = np.cumsum(weights) / total
            weights = weights[: int(np.searchsorted(reached, top_p)) + 1]
    if min_p > 0.0:
        weights = np.where(weights >= min_p, weights, 0.0)  # the most likely token has weight one
    edges = np.cumsum(weights)
    point = min(point * edges[-1], np.nextafter(edges[-1], 0))
    return int(candidates[np.searchsorted(edges, point, side="right")])


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest of scores [vocab] and of all that equal the least of them: int64, ascending."""
    columns = len(scores) // FOLDS
    if count >= len(scores):
        return np.arange(len(scores))
    candidates, some = None, scores
    if count < columns:
        # So many columns have each a score that is no less than the least of their largest ones: none below it counts.
        tops = scores[: columns * FOLDS].reshape(FOLDS, columns).max(axis=0)
        candidates = np.flatnonzero(scores >= np.partition(tops, -count)[-count])
        some = scores[candidates]
    found = np.flatnonzero(some >= np.partition(some, -count)[-count])
    return found if candidates is None else candidates[found]


def _nucleus(weights: np.ndarray, enough: float) -> np.ndarray:
    """Ids of the largest of weights float64 [vocab], ascending, that come to more than `enough`."""
    count = NUCLEUS
    while count < len(weights):
        found = largest(weights, count)
        if weights[found].sum() > enough * (1 + 1e-12):
            return found
        count *= 8
    return np.arange(len(weights))


def uniform(positions: np.ndarray, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 of the positions' shape, a pure function of (seed, position).

    SplitMix64 (Steele, Lea, Flood 2014): a counter-based generator needs no state to save.
    """
    z = positions.astype(np.uint64) + np.uint64((seed * 0xD1342543DE82EF95 + 1) & (1 << 64) - 1)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def uniform_at(position: int, seed: int) -> float:
    """`uniform` of a single position, by whole numbers of Python, which for one are ten times as fast."""
    mask = (1 << 64) - 1
    z = (position + seed * 0xD1342543DE82EF95 + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return ((z ^ z >> 31) >> 11) * 2.0**-53


def _check_options(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    seed: int | None,
) -> None:
    _check("temperature", temperature, 0.0, np.inf)
    _check("top_k", top_k, 0, np.inf)
    _check("top_p", top_p, 0.0, 1.0, above=True)
    _check("min_p", min_p, 0.0, 1.0)
    _check("repetition_penalty", repetition_penalty, 0.01, 100.0)
    _check("presence_penalty", presence_penalty, -MOST_PENALTY, MOST_PENALTY)
    _check("frequency_penalty", frequency_penalty, -MOST_PENALTY, MOST_PENALTY)
    for name, value in (("top_k", top_k), ("seed", seed)):
        if value is not None and not is_integer(value):
            raise SamplingError(f"{name} must be an integer, got {value!r:.60}")
    if seed is not None and seed < 0:
        raise SamplingError(f"seed must not be negative, got {seed}")


def _check(name: str, value: float, least: float, most: float, above: bool = False) -> None:
    if not is_real(value):
        raise SamplingError(f"{name} must be a number, got {value!r:.60}")
    try:
        float(value)
    except OverflowError:
        raise SamplingError(f"{name} is larger than any number it can be; give less") from None
    value = float(value)
    inside = (least < value if above else least <= value) and value <= most
    if not inside:  # also refuses NaN
        border = "above" if above else "at least"
        limit = f" and at most {most:g}" if most != np.inf else ""
        raise SamplingError(f"{name} must be {border} {least:g}{limit}, got {value}")
