"""Policies and token features: valid choices, independent of chunking, and formulas equal to their literal loops."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.controller.policies import FEATURE_NAMES, POLICIES, Policy, TokenFeatures, make_policy
from kvq.controller.policies.rule import RulePolicy
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.catalog.references import DEFAULT_MODEL, embedded_models
from kvq.runtime.errors import PolicyError
from kvq.runtime.policy.features import RarityCounter, attention_variance
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Pair, named
from kvq.runtime.session.session import Session
from tests.tools.kvdata import WIDTHS, examples, seeds


def make(name, **options):
    """A policy; learned ones come from the embedded bundle."""
    return make_policy(name, Bundle(embedded_models()[DEFAULT_MODEL]), **options)


every_policy = pytest.mark.parametrize("name", sorted(POLICIES))
cut_fractions = st.lists(st.floats(0, 1), max_size=6)


def features_for(policy, seed, count, start=0):
    """Plausible features of a run of tokens: those the policy needs, the others None."""
    rng = np.random.default_rng(seed)
    positions = np.arange(start, start + count)
    everything = {
        "entropy": rng.uniform(0, 10, count),
        "rarity": rng.uniform(0, 9, count),
        "attention_variance": rng.uniform(0, 20, count) / (positions + 1) ** 2,
        "confidence": rng.uniform(0, 1, count),
    }
    shape = Bundle(embedded_models()[DEFAULT_MODEL]).manifest.architecture
    keys, values = rng.standard_normal((2, shape.layers, shape.kv_heads, count, shape.head_dim), np.float32)
    return TokenFeatures(
        positions,
        **{name: everything[name].astype(np.float32) for name in policy.needs},
        ids=rng.integers(0, shape.vocab, count),
        residual=rng.standard_normal((count, shape.hidden), np.float32),
        keys=keys,
        values=values,
    )


def part(features, start, stop):
    """The features of the tokens [start, stop) of a run."""
    return TokenFeatures(
        *(None if x is None else x[:, :, start:stop] if x.ndim == 4 else x[start:stop] for x in features)
    )


def chunks(fractions, count):
    """(start, stop) of the chunks of a run cut at those fractions of its length."""
    edges = [0, *sorted(round(f * count) for f in fractions), count]
    return list(pairwise(edges))


@every_policy
@given(seed=seeds, count=st.integers(0, 80), start=st.integers(0, 10_000))
@examples(12)
def test_a_choice_is_a_pair_of_known_widths_for_every_token(name, seed, count, start):
    policy = make(name)
    bits = policy.choose(features_for(policy, seed, count, start))
    assert bits.shape == (count, 2)
    assert bits.dtype == np.uint8
    assert set(bits.ravel().tolist()) <= set(WIDTHS)


@every_policy
@given(seed=seeds, count=st.integers(0, 80), start=st.integers(0, 200), cuts=cut_fractions)
@examples(12)
def test_a_choice_does_not_depend_on_the_chunks(name, seed, count, start, cuts):
    policy = make(name)
    features = features_for(policy, seed, count, start)
    pieces = [policy.choose(part(features, *chunk)) for chunk in chunks(cuts, count)]
    np.testing.assert_array_equal(np.concatenate(pieces), policy.choose(features))


@every_policy
def test_a_policy_carries_its_name_and_asks_for_known_features(name):
    policy = make(name)
    assert policy.name == ("adaptive" if name == "auto" else name)  # the embedded model has a controller
    assert policy.needs <= set(FEATURE_NAMES)


@pytest.mark.parametrize(
    ("name", "pair"), [("fp16", (16, 16)), ("int8", (8, 8)), ("int4", (5, 5)), ("int3", (3, 3)), ("int2", (2, 2))]
)
def test_the_static_policies_use_the_width_in_their_name(name, pair):
    policy = make_policy(name)
    assert {tuple(row) for row in policy.choose(features_for(policy, 0, 50)).tolist()} == {pair}
    assert name.endswith(str(Pair(*pair).bits[0]))


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("v", WIDTHS)
def test_every_pair_of_widths_can_be_asked_for_by_name(k, v):
    policy = make_policy(str(Pair(k, v)))
    assert policy.choose(features_for(policy, 0, 3)).tolist() == [[k, v]] * 3


def test_mixed_uses_every_width_in_turn():
    policy = make_policy("mixed")
    names = [CODECS[id_].precision.name for id_ in policy.choose(features_for(policy, 0, 9))[:, 0].tolist()]
    assert names == ["16", "8", "4", "2", "16", "8", "4", "2", "16"]


@pytest.mark.parametrize("focused", [False, True])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_the_rule_goes_up_one_step_for_each_sign(focused, common, early):
    position = 10 if early else 10 + RulePolicy.EARLY_TOKENS
    row_length = position + 1
    variance = np.float32(RulePolicy.FOCUS * (1.1 if focused else 0.9) / row_length**2)
    rarity = np.float32(RulePolicy.COMMON_NATS * (0.9 if common else 1.1))
    features = TokenFeatures(np.array([position]), rarity=rarity[None], attention_variance=variance[None])
    ladder = [named("3"), named("4"), named("8", "4"), named("8")]
    assert make_policy("rule").choose(features).tolist() == [list(ladder[focused + common + early])]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3, 4), (0.7, 0.1, 0.1, 0.1), (10, 1, 1, 30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_draws_each_width_as_often_as_its_weight_says(weights, seed):
    policy = make_policy("random", weights=weights, seed=seed)
    count = 40_000
    bits = policy.choose(features_for(policy, 0, count))
    for name, weight in zip(("16", "8", "4", "2"), weights, strict=True):
        share = weight / sum(weights)
        drawn = (bits[:, 0] == named(name).k).mean()
        assert abs(drawn - share) < 4 * math.sqrt(share * (1 - share) / count)
    np.testing.assert_array_equal(bits[:, 0], bits[:, 1])


def test_random_depends_on_the_seed_and_the_position_only():
    def drawn(seed, text, start=0):
        policy = make_policy("random", seed=seed)
        return policy.choose(features_for(policy, text, 500 - start, start))

    np.testing.assert_array_equal(drawn(1, text=0), drawn(1, text=5))
    np.testing.assert_array_equal(drawn(1, text=0)[123:], drawn(1, text=0, start=123))
    # Two independent draws of four equal classes agree on a quarter of the tokens.
    assert 0.15 < (drawn(1, text=0) == drawn(0, text=0)).all(axis=1).mean() < 0.35


@pytest.mark.slow
def test_random_successive_positions_are_not_correlated():
    policy = make_policy("random")
    bits = np.log2(policy.choose(features_for(policy, 0, 20_000))[:, 0])
    assert abs(np.corrcoef(bits[:-1], bits[1:])[0, 1]) < 4 / math.sqrt(20_000)


def test_random_with_a_large_seed_gives_no_numpy_warning():
    policy = make_policy("random", seed=12345)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.choose(features_for(policy, 0, 10))


@pytest.mark.parametrize("name", ["", "int5", "INT4", "k4", "kvq.runtime"])
def test_an_unknown_policy_is_named_with_the_known_ones(name):
    with pytest.raises(PolicyError, match=r"fp16.*random") as error:
        make_policy(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


@every_policy
def test_an_option_a_policy_does_not_take_is_named(name):
    with pytest.raises(PolicyError, match="flavour") as error:
        make(name, flavour="sour")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weights",
    [
        (),
        (1, 1),
        (1, 1, 1, 1, 1),
        (0, 0, 0, 0),
        (-1, 1, 1, 1),
        (math.nan, 1, 1, 1),
        (math.inf, 1, 1, 1),
        "abcd",
        3,
        10**400,
        [10**400] * 4,
    ],
    ids=lambda weights: str(weights)[:20],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_refuses_weights_that_are_not_four_positive_numbers(weights):
    with pytest.raises(PolicyError, match="weights") as error:
        make_policy("random", weights=weights)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("weights", [(1e308,) * 4, (5e-324,) * 4, (1, 0, 0, 0), (0, 0, 0, 1e308)], ids=str)
@pytest.mark.filterwarnings("error")
def test_random_draws_by_weights_at_the_ends_of_what_there_is(weights):
    policy = make_policy("random", weights=weights)
    drawn = {int(bits) for bits in policy.choose(features_for(policy, 0, 200))[:, 0]}
    assert drawn == {int(class_[0]) for class_, weight in zip(policy.classes, weights, strict=True) if weight}
    means, prices = policy.curve(np.array([400, 200, 100, 50]))  # what a budget asks for
    assert np.isfinite(means).all()
    assert np.isfinite(prices).all()


@pytest.mark.parametrize("seed", [-1, 2**64, "x", 1.5, None], ids=str)
def test_random_refuses_a_seed_that_is_no_unsigned_64_bit_integer(seed):
    with pytest.raises(PolicyError, match="seed") as error:
        make_policy("random", seed=seed)
    assert "\n" not in str(error.value)


def test_a_ready_policy_is_taken_as_it_is():
    policy = make_policy("int4")
    assert make_policy(policy) is policy


def test_options_beside_a_ready_policy_are_refused():
    with pytest.raises(PolicyError, match="seed") as error:
        make_policy(make_policy("random"), seed=1)
    assert "\n" not in str(error.value)


def literal_rarities(ids):
    """R_t = -log((c(x_t) + 1) / (N + |V_obs| + 1)), counted anew for every token."""
    rarities = []
    for t, token in enumerate(ids):
        earlier = ids[:t]
        rarities.append(-math.log((earlier.count(token) + 1) / (len(earlier) + len(set(earlier)) + 1)))
    return rarities


@given(ids=st.lists(st.integers(0, 11), max_size=60), cuts=cut_fractions)
@examples(80)
def test_rarity_equals_its_formula_for_any_chunking(ids, cuts):
    counter = RarityCounter(12)
    found = []
    for start, stop in chunks(cuts, len(ids)):
        chunk = np.array(ids[start:stop], np.int64)
        rarity = counter.rarity(chunk)
        assert rarity.dtype == np.float32
        found += rarity.tolist()
        counter.count(chunk)
    np.testing.assert_allclose(found, literal_rarities(ids), rtol=1e-6, atol=1e-6)


@given(ids=st.lists(st.integers(0, 5), max_size=20))
@examples(30)
def test_asking_for_rarities_counts_nothing(ids):
    counter = RarityCounter(6)
    counter.count(np.array([1, 1, 2]))
    first = counter.rarity(np.array(ids, np.int64))
    np.testing.assert_array_equal(counter.rarity(np.array(ids, np.int64)), first)


@given(seed=seeds, heads=st.integers(1, 9), lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8))
@examples(60)
def test_attention_variance_equals_numpy_s_variance_of_the_rows(seed, heads, lengths):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0, 6)  # from uniform rows to concentrated ones
    expected, squares = [], np.empty((len(lengths), heads), np.float32)
    for t, length in enumerate(lengths):
        rows = np.exp(rng.standard_normal((heads, length)) * scale)
        rows /= rows.sum(axis=1, keepdims=True)
        squares[t] = (rows**2).sum(axis=1)
        expected.append(np.var(rows, axis=1).mean())
    found = attention_variance(squares, np.array(lengths))
    assert found.dtype == np.float32
    # The difference of two close numbers keeps the rounding of the larger one.
    rounding = 4 * 2.0**-23 * squares.mean(axis=1) / np.array(lengths)
    assert (np.abs(found - np.array(expected)) <= rounding).all()


class Recorder(Policy):
    """Stores everything at 8 bits and keeps the features it was shown."""

    name = "recorder"

    def __init__(self, *needs):
        self.needs = frozenset(needs)
        self.shown = []

    def choose(self, features):
        self.shown.append(features)
        return np.full((len(features.positions), 2), 8, np.uint8)


@pytest.mark.parametrize("needs", [(), *((name,) for name in FEATURE_NAMES), FEATURE_NAMES], ids="+".join)
def test_a_session_computes_no_feature_of_the_pair_it_was_not_asked_for(tiny_model, needs):
    # Entropy and confidence come from one graph, so asking for one of them may bring the other.
    policy = Recorder(*needs)
    session = Session(tiny_model, policy, prefill_chunk=4)
    session.append([1, 2, 3, 4, 5, 6])
    session.append([7])
    assert np.concatenate([f.positions for f in policy.shown]).tolist() == list(range(7))
    uncertainty = {"entropy", "confidence"}
    computed = set(needs) | (uncertainty if set(needs) & uncertainty else set())
    for features in policy.shown:
        assert {name for name in FEATURE_NAMES if getattr(features, name) is not None} == computed
        for name in computed:
            assert getattr(features, name).dtype == np.float32
            assert getattr(features, name).shape == features.positions.shape
