"""Sampling: what each option keeps, how often it is drawn, and which values are refused."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.runtime.errors import SamplingError
from kvq.runtime.session.sampling import log_probability, make_sampler

DRAWS = 4000
VOCAB = 12

FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 6, "min_p": 0.3, "temperature": 1.5},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.1, "temperature": 0.7},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5, "top_p": 0.8},
]
HISTORY = [3, 7, 3, 3, 0]


def softmax(scores: list[float]) -> list[float]:
    peak = max(scores)
    weights = [math.exp(score - peak) for score in scores]
    return [weight / sum(weights) for weight in weights]


def literal_distribution(
    logits: list[float],
    history: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> dict[int, float]:
    """Token -> probability, by the words of `make_sampler`'s docstring, one token at a time."""
    scores = list(logits)
    for token in set(history):
        positive = scores[token] > 0
        scores[token] = scores[token] / repetition_penalty if positive else scores[token] * repetition_penalty
    scores = [score / temperature for score in scores]
    kept = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if top_k:
        kept = kept[:top_k]
    probability = dict(zip(kept, softmax([scores[token] for token in kept]), strict=True))
    fewest, reached = [], 0.0
    for token in kept:
        if fewest and reached >= top_p:
            break
        fewest.append(token)
        reached += probability[token]
    kept = [token for token in fewest if probability[token] >= min_p * probability[fewest[0]]]
    return dict(zip(kept, softmax([scores[token] for token in kept]), strict=True))


def draws(sampler, logits: np.ndarray, history: list[int], count: int) -> list[tuple[int, float]]:
    """What the sampler draws at `count` places of a text, one behind the other, over the same ids each time."""
    longer = np.array([*history, *[history[0] if history else 0] * count])
    return [sampler(logits, longer[: len(history) + i]) for i in range(count)]


def some_logits(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.2, vocab).astype(np.float32)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_draws_come_from_the_kept_set_with_its_renormalised_probabilities(options, seed):
    logits = some_logits(seed)
    expected = literal_distribution(logits.tolist(), HISTORY, **options)
    sampler = make_sampler(**{"temperature": 1.0, **options}, seed=seed)
    counts = Counter(token for token, _ in draws(sampler, logits, HISTORY, DRAWS))

    assert set(counts) <= set(expected)
    assert {token for token, p in expected.items() if p * DRAWS > 20} <= set(counts)
    likely = [token for token, p in expected.items() if p * DRAWS >= 5]
    chi_square = sum((counts[token] - expected[token] * DRAWS) ** 2 / (expected[token] * DRAWS) for token in likely)
    freedom = max(1, len(likely) - 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations; the seeds are fixed


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30, unique=True),
    st.integers(0, 35),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_no_token_outside_the_kept_set_is_ever_drawn(tenths, top_k, top_p, min_p, temperature, seed):
    logits = np.array(tenths, np.float32) / 10
    options = {"temperature": temperature, "top_k": top_k, "min_p": min_p}
    # A border that falls on a cumulative sum is decided by rounding: both sides of it are right.
    expected = set(literal_distribution(logits.tolist(), [], top_p=min(1.0, top_p + 1e-9), **options))
    sampler = make_sampler(top_p=top_p, seed=seed, **options)
    assert {token for token, _ in draws(sampler, logits, [], 30)} <= expected


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_greedy_takes_the_first_largest_logit_whatever_the_other_options(logits, seed):
    array = np.array(logits, np.float32)
    token, _ = make_sampler(temperature=0, top_k=3, top_p=0.5, min_p=0.5, seed=seed)(array, [])
    assert token == logits.index(max(logits))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = np.array([1.0, 9.0, 3.0, -2.0], np.float32)
    sampler = make_sampler(temperature=temperature, seed=0)
    assert {token for token, _ in draws(sampler, logits, [], 20)} == {1}


def test_a_high_temperature_draws_every_token():
    sampler = make_sampler(temperature=1e6, seed=0)
    assert {token for token, _ in draws(sampler, some_logits(0), [], 300)} == set(range(VOCAB))


def test_ties_at_the_border_of_top_k_are_kept_by_id():
    # "ties by id, so that a seed means the same on every machine"
    logits = np.zeros(1000, np.float32)
    sampler = make_sampler(temperature=1.0, top_k=5, seed=0)
    assert {token for token, _ in draws(sampler, logits, [], 200)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(options):
    logits = [some_logits(i, 200) for i in range(40)]

    def tokens(seed: int) -> list[int]:
        sampler = make_sampler(**{"temperature": 1.0, **options}, seed=seed)
        return [sampler(row, HISTORY)[0] for row in logits]

    assert tokens(5) == tokens(5)
    if options not in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):  # those leave one token
        assert tokens(5) != tokens(6)


def test_a_draw_depends_on_seed_and_place_alone():
    logits = np.zeros(1000, np.float32)
    first = make_sampler(seed=4)
    expected = [token for token, _ in draws(first, logits, [], 40)]
    again = make_sampler(seed=4)
    places = np.random.default_rng(0).permutation(40)
    assert [again(logits, [7] * place)[0] for place in places] == [expected[place] for place in places]
    assert len(set(expected)) > 30


def test_neighbouring_seeds_do_not_draw_alike():
    logits = np.zeros(10_000, np.float32)
    rows = [[token for token, _ in draws(make_sampler(seed=seed), logits, [], 50)] for seed in range(20)]
    tokens = [token for row in rows for token in row]
    assert len(set(tokens)) > 900  # 953 of 1,000 independent draws are expected to differ


def test_without_a_seed_two_samplers_differ():
    logits = np.zeros(1000, np.float32)
    runs = [draws(sampler, logits, [], 20) for sampler in (make_sampler(), make_sampler())]
    assert runs[0] != runs[1]  # equal by chance once in 1e60


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_divides_positive_and_multiplies_negative_logits_once_per_distinct_token(penalty):
    logits = np.array([2.0, -1.0, 0.0, 0.5, -0.3], np.float32)
    history = [0, 0, 0, 1, 2]
    scores = [2.0 / penalty, -1.0 * penalty, 0.0, 0.5, -0.3]
    expected = softmax(scores)
    sampler = make_sampler(temperature=1.0, repetition_penalty=penalty, seed=3)
    counts = Counter(token for token, _ in draws(sampler, logits, history, DRAWS))
    for token, p in enumerate(expected):
        assert abs(counts[token] - p * DRAWS) < 5 * math.sqrt(DRAWS * p * (1 - p))


def test_the_penalty_changes_the_greedy_choice_only_of_tokens_in_the_history():
    logits = np.array([1.0, 1.2, 0.1], np.float32)
    sampler = make_sampler(temperature=0, repetition_penalty=1.5)
    assert [sampler(logits, history)[0] for history in ([], [0], [1], [0, 1])] == [1, 1, 0, 1]


def test_sampling_leaves_the_logits_as_they_were():
    logits = some_logits(4)
    before = logits.copy()
    make_sampler(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.4, seed=0)(logits, HISTORY)
    np.testing.assert_array_equal(logits, before)


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=60), st.data())
@settings(max_examples=100, deadline=None)
def test_the_log_probability_is_log_softmax_of_the_raw_logits(logits, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    wide = np.array(logits, np.float64)
    expected = wide[token] - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert log_probability(np.array(logits, np.float32), token) == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_the_returned_log_probability_ignores_temperature_filters_and_penalty():
    logits = some_logits(9)
    sampler = make_sampler(temperature=3.0, top_k=4, min_p=0.1, repetition_penalty=2.0, seed=1)
    expected = np.log(softmax(logits.tolist()))
    for token, logprob in draws(sampler, logits, HISTORY, 50):
        assert logprob == pytest.approx(expected[token], abs=1e-5)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("layout", ["strided", "reversed", "column", "readonly"])
def test_the_memory_layout_of_the_logits_does_not_matter(options, layout):
    logits = some_logits(11, 100)
    if layout == "strided":
        other = np.repeat(logits, 3)[::3]
    elif layout == "reversed":
        other = logits[::-1].copy()[::-1]
    elif layout == "column":
        other = np.asfortranarray(np.stack([logits, -logits]))[0]
    else:
        other = logits.copy()
        other.flags.writeable = False
    runs = []
    for array in (logits, other):
        sampler = make_sampler(**{"temperature": 1.0, **options}, seed=8)
        runs.append(draws(sampler, array, HISTORY, 20))
    assert [token for token, _ in runs[0]] == [token for token, _ in runs[1]]
    assert [p for _, p in runs[0]] == pytest.approx([p for _, p in runs[1]], abs=1e-5)


@pytest.mark.parametrize("history", [[], (3,), np.array([3, 7])], ids=["list", "tuple", "array"])
def test_any_sequence_is_a_history(history):
    token, _ = make_sampler(temperature=0, repetition_penalty=1.2)(some_logits(1), history)
    expected = literal_distribution(some_logits(1).tolist(), list(history), repetition_penalty=1.2, top_k=1)
    assert [token] == list(expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1),
        ("temperature", -1e-9),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -2),
        ("repetition_penalty", math.nan),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_one_line_that_names_option_and_value(option, value):
    with pytest.raises(SamplingError) as caught:
        make_sampler(**{option: value})
    message = str(caught.value)
    assert option in message
    assert str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0),
        ("top_k", 0),
        ("top_p", 1),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 1),
        ("seed", 0),
    ],
)
def test_the_borders_of_the_ranges_are_allowed(option, value):
    token, logprob = make_sampler(**{option: value})(some_logits(0), HISTORY)
    assert 0 <= token < VOCAB
    assert logprob < 0


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_below_one_is_refused(tiny_model, max_tokens):
    with pytest.raises(SamplingError, match=f"max_tokens must be at least 1, an integer, got {max_tokens}"):
        tiny_model.session().generate("Hello", max_tokens=max_tokens)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"seed": -1}, {"repetition_penalty": 0}])
def test_generate_refuses_options_out_of_range_and_appends_nothing(tiny_model, options):
    session = tiny_model.session()
    with pytest.raises(SamplingError):
        session.generate("Hello", **options)
    assert session.tokens == []
    assert session.pending == []


@given(
    st.lists(st.floats(-8, 8), min_size=VOCAB, max_size=VOCAB),
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
)
@settings(deadline=None)
def test_penalties_and_biases_are_what_the_words_say(logits, before, said, presence, frequency, bias):
    """Presence and frequency count what this sampler has drawn, and nothing that was there before."""
    values = np.array(logits, np.float32)
    options = {"presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": bias}
    sample = make_sampler(temperature=0, **options)
    kept = values.copy()
    for at in range(len(said) + 1):
        token, logprob = sample(values, [*before, *said[:at]])
        counts = Counter(said[:at])
        scores = [
            np.float32(x) - frequency * counts[i] - presence * (counts[i] > 0) + bias.get(i, 0)
            for i, x in enumerate(values)
        ]
        assert scores[token] == pytest.approx(max(scores), abs=1e-3)
        assert logprob == log_probability(values, token)
    assert (values == kept).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presence_penalty": 101}, "presence_penalty must be"),
        ({"frequency_penalty": "much"}, "frequency_penalty must be"),
        ({"presence_penalty": math.nan}, "presence_penalty must be"),
        ({"logit_bias": {"5": 1}}, "token ids to numbers"),
        ({"logit_bias": {-1: 1}}, "token ids to numbers"),
        ({"logit_bias": {True: 1}}, "token ids to numbers"),
        ({"logit_bias": [1]}, "must map"),
        ({"logit_bias": {5: 101}}, "from -100 to 100"),
        ({"logit_bias": {5: math.nan}}, "from -100"),
    ],
)
def test_what_is_no_penalty_is_refused(options, words):
    with pytest.raises(SamplingError, match=words):
        make_sampler(**options)


def test_processors_see_the_ids_and_what_the_one_before_left():
    seen = []

    def first(ids, logits):
        seen.append(list(ids))
        logits[:] = -np.inf  # theirs to change
        logits[4] = 1.0
        return logits

    def second(ids, logits):
        return np.where(logits == 1.0, logits, -5.0)

    logits = np.arange(VOCAB, dtype=np.float32)
    sample = make_sampler(processors=[first, second], temperature=0)
    assert sample(logits, HISTORY)[0] == 4
    assert seen == [HISTORY]
    assert logits[0] == 0
    for wrong in (
        lambda ids, logits: logits[:3],
        lambda ids, logits: logits * np.nan,
        lambda ids, logits: logits - np.inf,
        lambda ids, logits: logits + 2e30,  # a penalty would have it infinite
        lambda ids, logits: logits.astype(np.float64) + 1e300,
        lambda ids, logits: "logits",
        lambda ids, logits: [[0.0], [1.0, 2.0]],
        lambda ids, logits: [10**400] * VOCAB,
        lambda ids, logits: None,
    ):
        with pytest.raises(SamplingError, match="a logits processor must give"):
            make_sampler(processors=[wrong])(logits, [])
