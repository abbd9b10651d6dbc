"""Draws from a large vocabulary, of which the largest logits alone are looked at, beside sorting all of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.runtime.session.sampling import SAMPLING_STREAM, largest, make_sampler, uniform, uniform_at


def drawn_by_sorting(logits, place, seed, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The token of a draw, found by sorting the whole vocabulary."""
    scores = (logits.astype(np.float64) - logits.max()) / temperature
    order = np.lexsort((np.arange(len(scores)), -scores))[: top_k or None]
    if not top_k and top_p == 1.0:
        order = np.arange(len(scores))
    weights = np.exp(scores[order])
    if top_p < 1.0:
        weights = weights[: int(np.searchsorted(np.cumsum(weights) / weights.sum(), top_p)) + 1]
    weights = np.where(weights >= min_p, weights, 0)
    point = uniform(np.array([place]), seed ^ SAMPLING_STREAM)[0]
    edges = np.cumsum(weights)
    return int(order[np.searchsorted(edges, point * edges[-1], side="right")])


@given(
    vocab=st.integers(300, 20_000),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    whole=st.booleans(),  # many ties
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.2, 0.8, 1.0, 2.0]),
            "top_k": st.sampled_from([0, 1, 7, 40, 500]),
            "top_p": st.sampled_from([0.05, 0.5, 0.95, 0.9999, 1.0]),
            "min_p": st.sampled_from([0.0, 0.05]),
        }
    ),
    forbidden=st.sampled_from([0, 100, 299]),  # of every 300 tokens, as by a grammar
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None)
def test_draws_from_a_large_vocabulary_are_those_of_a_sorted_one(vocab, spread, whole, options, forbidden, seed):
    logits = np.random.default_rng(seed).normal(0, spread, vocab).astype(np.float32)
    if whole:
        logits = np.round(logits)
    logits[np.arange(vocab) % 300 < forbidden] = -np.inf
    sampler = make_sampler(**options, seed=seed)
    for place in range(5):
        assert sampler(logits, [0] * place)[0] == drawn_by_sorting(logits, place, seed, **options)


@given(
    st.one_of(st.integers(1, 400), st.integers(400, 3000)),
    st.integers(1, 3500),
    st.sampled_from([1, 3, 1000]),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_the_largest_are_found_whatever_ties_there_are(size, count, values, seed):
    scores = np.random.default_rng(seed).integers(0, values, size).astype(np.float32)
    scores[scores == 0] = -np.inf
    border = np.sort(scores)[::-1][min(count, size) - 1]
    np.testing.assert_array_equal(largest(scores, count), np.flatnonzero(scores >= border))


@given(st.integers(0, 2**40), st.integers(0, 2**64 - 1))
def test_a_single_place_has_the_number_it_has_among_many(place, seed):
    assert uniform_at(place, seed) == uniform(np.array([place, 7]), seed)[0]
