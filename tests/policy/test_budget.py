"""Byte budgets: never exceeded by the bytes of a real store, used where the text is long, impossible ones refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvq.controller.policies import ScoredPolicy, make_policy
from kvq.runtime.cli.options import nbytes
from kvq.runtime.cli.run import run
from kvq.runtime.errors import BudgetError
from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.pages import BucketBytes
from kvq.runtime.kv.slots import Encoded
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.base import curve_of
from kvq.runtime.policy.budget import SHORT_TEXT, Budget
from kvq.runtime.precision.table import Geometry, Pair
from kvq.runtime.session.session import Session
from tests.tools.kvdata import examples, seeds
from tests.tools.work import LITTLE, bounded_work

GEOMETRY = Geometry(1, 1, 64)  # one head: the bytes of a token in other geometries are a multiple, but for its tag
CONTEXT = 2048
LADDER = np.array([(2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 16)], np.uint8)


class Scores(ScoredPolicy):
    """Scores drawn by position: heavy-tailed damages, as real ones are; the curve may be of other texts."""

    name = "scores"

    def __init__(self, seed, spread, curve_seed=None):
        self.classes = LADDER
        self.seed, self.spread = seed, spread
        self.curve_seed = seed if curve_seed is None else curve_seed

    def draw(self, seed, count):
        damage = np.exp(self.spread * np.random.default_rng(seed).standard_normal((count, 1)))
        return -damage * np.array([1.0, 0.1, 0.03, 0.01, 1e-4, 0.0], np.float32)

    def score(self, features):
        return self.draw(self.seed, CONTEXT)[features.positions]

    def curve(self, nbytes):
        return curve_of(self.draw(self.curve_seed, 2000), nbytes)


def spend(budget, policy, length, cuts, recent, sink):
    """Append `length` tokens to a real store in chunks under a budget; the bytes after each chunk are checked."""
    store = KVStore(GEOMETRY, recent=recent, sink=sink)
    scores = policy.draw(policy.seed, CONTEXT)
    edges = sorted({0, length, *(min(length, max(0, c)) for c in cuts)})
    for start, stop in pairwise(edges):
        bits = budget.choose(scores[start:stop], budget.counts(store), start, stop)
        assert bits.shape == (stop - start, 2)
        kv = np.zeros((2, 1, 1, stop - start, 64), np.float32)
        store.append(kv[0], kv[1], bits)
        assert budget.used(store) <= budget.allowed(store.length) + 1e-6
    return store


@pytest.mark.slow
@given(
    seed=seeds,
    length=st.integers(1, 1500),
    kv_bits=st.floats(3.2, 16),
    spread=st.floats(0, 3),
    cuts=st.lists(st.integers(0, 1500), max_size=8),
    singles=st.booleans(),
    recent=st.sampled_from([0, 1, 16, 40]),
    sink=st.sampled_from([0, 0, 4]),
)
@example(0, 600, 9.0, 0.0, [], False, 0, 0)  # all tokens score alike: no price leads to 9 bits
@examples(100)
def test_a_budget_of_bits_is_never_exceeded_and_is_used(seed, length, kv_bits, spread, cuts, singles, recent, sink):
    policy = Scores(seed, spread, curve_seed=seed + 1)
    budget = Budget(policy, GEOMETRY, CONTEXT, recent, sink, kv_bits=kv_bits)
    if singles:  # the second half token by token
        cuts = range(length // 2, length)
    store = spend(budget, policy, length, cuts, recent, sink)
    if length >= 600:
        bits = 8 * store.used_nbytes / (2 * 64 * length)
        assert bits >= 0.95 * min(kv_bits, 16)
        assert bits <= kv_bits * max(1, SHORT_TEXT / length) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [3.25, 4.25])
@pytest.mark.parametrize("singles", [False, True])
def test_a_short_text_spends_the_allowance_of_a_long_one_early(kv_bits, singles):
    """Bits a value fall with the length, down to what was asked; from SHORT_TEXT on it is a hard bound."""
    policy, found = Scores(5, 1.5), []
    for length in (60, 120, 300, 600, SHORT_TEXT, 1500):
        budget = Budget(policy, GEOMETRY, CONTEXT, 16, 4, kv_bits=kv_bits)
        store = spend(budget, policy, length, range(length) if singles else (), 16, 4)
        found.append(8 * store.used_nbytes / (2 * 64 * length))
    assert found == sorted(found, reverse=True)
    assert found[0] > kv_bits + 4
    assert found[2] > kv_bits + 0.5
    assert max(found[4:]) <= kv_bits + 1e-6


def test_tokens_between_are_not_starved_by_early_ones():
    """A text that comes token by token has something above the cheapest class for every stretch of it."""
    policy = Scores(5, 1.5)
    budget = Budget(policy, GEOMETRY, CONTEXT, 16, 4, kv_bits=3.25)
    bits, counts, scores = [], np.zeros(len(budget.pairs), np.int64), policy.draw(5, CONTEXT)
    for at in range(1500):
        bits.append(budget.choose(scores[at : at + 1], counts, at, at + 1)[0].sum() / 2)
    means = np.array(bits[4:1476]).reshape(-1, 64).mean(1)
    assert means.min() > 2.1


def test_a_budget_without_short_texts_holds_at_every_length():
    policy = Scores(5, 1.5)
    budget = Budget(policy, GEOMETRY, CONTEXT, 16, 4, kv_bits=4.25, short_text=0)
    for length in (60, 120, 300, 600):
        store = spend(budget, policy, length, (), 16, 4)
        assert store.used_nbytes <= max(4.25 * 2 * 64 * length / 8, budget.least(length))


@pytest.mark.slow
@given(
    seed=seeds,
    length=st.integers(1, 1500),
    memory=st.integers(150_000, 600_000),
    spread=st.floats(0, 3),
    cuts=st.lists(st.integers(0, 1500), max_size=30),
    recent=st.sampled_from([0, 16]),
)
@examples(60)
def test_a_budget_of_memory_holds_for_all_arrays(seed, length, memory, spread, cuts, recent):
    policy = Scores(seed, spread)
    budget = Budget(policy, GEOMETRY, CONTEXT, recent, kv_memory=memory)
    store = spend(budget, policy, length, cuts, recent, 0)
    assert store.nbytes <= memory


@pytest.mark.parametrize("memory", [150_000, 300_000, 500_000])
def test_a_budget_of_memory_is_used_by_a_full_context(memory):
    policy = Scores(0, 1.5)
    budget = Budget(policy, GEOMETRY, CONTEXT, 16, kv_memory=memory)
    store = spend(budget, policy, CONTEXT, range(0, CONTEXT, 100), 16, 0)
    assert 0.9 * memory <= store.nbytes <= memory


@given(count=st.integers(0, 1500), k=st.sampled_from([2, 4, 8, 16]), v=st.sampled_from([2, 4, 8, 16]))
@examples(40)
def test_predicted_bytes_are_those_of_a_bucket(count, k, v):
    bucket = Bucket(Pair(k, v), GEOMETRY)
    if count:
        x = np.zeros((1, 1, count, 64), np.float32)
        parts = [[Encoded(*codec.encode(x))] for codec in _codecs(k, v)]
        bucket.append(*parts, np.arange(count, dtype=np.int32))
    each = GEOMETRY.token_bytes((k, v))
    assert bucket.nbytes == BucketBytes(Pair(k, v), GEOMETRY)[count]
    assert bucket.count * bucket.token_bytes == each * count


def _codecs(k, v):
    from kvq.runtime.precision.codecs import CODECS

    return CODECS[k], CODECS[v]


@pytest.mark.parametrize("recent", [0, 16])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 18, 40, 300])
def test_least_is_what_a_store_of_cheapest_tokens_takes(length, recent):
    budget = Budget(Scores(0, 1), GEOMETRY, CONTEXT, recent, kv_bits=4)
    store = KVStore(GEOMETRY, recent=recent)
    kv = np.zeros((1, 1, length, 64), np.float32)
    store.append(kv, kv, np.full((length, 2), 2, np.uint8))
    assert abs(budget.least(length) - store.used_nbytes) <= 1


def test_a_surplus_buys_precision_for_the_tokens_that_need_it():
    policy = Scores(3, 2.0)
    budget = Budget(policy, GEOMETRY, CONTEXT, 0, kv_bits=3.6)
    bits = budget.choose(policy.draw(3, CONTEXT)[:800], np.zeros(len(budget.pairs), np.int64), 0, 800)
    damage = -policy.draw(3, CONTEXT)[:800, 0]
    assert bits[damage > np.quantile(damage, 0.9)].sum() > 1.5 * bits[damage < np.quantile(damage, 0.5)].sum() / 5


@pytest.mark.parametrize("policy", ["rule", "random"])
@pytest.mark.parametrize("kv_bits", [9.0, 12.0])
def test_a_session_keeps_its_budget_at_every_token(policy, kv_bits, tiny_model):
    session = tiny_model.session(policy, recent=4, kv_bits=kv_bits)
    for size in (1, 1, 1, 40, 1, 60, *[1] * 60):
        session.append(np.random.default_rng(size).integers(0, 512, size))
        assert session.budget.used(session.store) <= session.budget.allowed(session.store.length)
    assert session.stats().kv_used_bits >= 0.95 * kv_bits


def test_trimmed_sessions_keep_their_budget(tiny_model):
    session = tiny_model.session("random", recent=4, kv_bits=9)
    context = tiny_model.architecture.context
    session.append(np.arange(context // 2) + 1)
    session.trim(60)
    session.append(np.arange(context - 60) % 100 + 1)
    assert session.stats().kv_used_bits <= 9


def test_a_policy_of_fixed_precision_cannot_follow_a_budget(tiny_model):
    with pytest.raises(BudgetError, match="fixed precisions") as caught:
        tiny_model.session("int4", kv_bits=9)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [{"kv_bits": 0.5}, {"kv_bits": 2}, {"kv_memory": 1000}], ids=str)
def test_a_budget_below_what_is_possible_is_refused_with_the_possible(limit, tiny_model):
    with pytest.raises(BudgetError, match="below") as caught:
        Session(tiny_model, "random", **limit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "limit",
    [{"kv_bits": 0}, {"kv_bits": -1}, {"kv_bits": float("nan")}, {"kv_bits": True}, {"kv_memory": "8MB"},
     {"kv_bits": 9, "kv_memory": 10**6}],
    ids=str,
)  # fmt: skip
def test_no_budget_at_all_is_refused(limit, tiny_model):
    with pytest.raises(BudgetError) as caught:
        Session(tiny_model, "random", **limit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("800kB", 8e5), ("8MB", 8e6), ("8 mb", 8e6), ("1.5G", 1.5e9), ("1GiB", 2**30), ("4096", 4096), ("10B", 10)],
)
def test_sizes_are_read(text, expected):
    assert nbytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-8MB", "8TBx", "1e6", "eight"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BudgetError, match="not a size"):
        nbytes(text)


def test_the_command_line_takes_budgets(tiny_bundle):
    options = ["-m", str(tiny_bundle), "-p", "random", "--json", "-n", "20", "-s", "1", "once upon a time there was"]
    result = CliRunner().invoke(run, [*options, "--kv-bits", "11.5"])
    assert result.exit_code == 0, result.output
    assert '"kv_used_bits"' in result.output


def test_every_scored_policy_has_a_curve_that_rises():
    for name in ("random", "rule"):
        policy = make_policy(name)
        means, mu = policy.curve(np.array([GEOMETRY.token_bytes(tuple(pair)) for pair in policy.classes.tolist()]))
        assert (np.diff(means) > 0).all()
        assert (np.diff(mu) < 0).all()


@given(
    context=st.integers(1, 1500), recent=st.integers(0, 40), bits=st.floats(2.3, 12), short=st.integers(0, 1500)
)  # fmt: skip
@settings(deadline=None)  # a curve is drawn each time
def test_what_cheapest_tokens_need_is_the_most_that_any_after_them_do(context, recent, bits, short):
    try:
        budget = Budget(Scores(0, 1.0), GEOMETRY, context, recent, kv_bits=bits, short_text=short)
    except BudgetError:
        return
    each, grows = min(GEOMETRY.token_bytes(Pair(*pair)) for pair in LADDER.tolist()), bits * GEOMETRY.values / 8
    needs = each * np.arange(context + 3)
    for tokens in {0, context // 2, context + 2}:
        most = (needs[tokens:] - grows * np.arange(context + 3 - tokens)).max()
        assert budget._need(tokens) == pytest.approx(most)


@pytest.mark.parametrize("limit", [{"kv_bits": 4.0}, {"kv_memory": 1e12}], ids=str)
def test_a_context_of_millions_costs_nothing(limit):
    """A manifest may state it, and nothing else of its model has to be as large."""
    with bounded_work(LITTLE // 8):
        budget = Budget(Scores(0, 1.0), GEOMETRY, 1 << 24, 16, 4, **limit)
        counts = np.zeros(len(budget.pairs), np.int64)
        assert budget.choose(np.zeros((3, len(LADDER)), np.float32), counts, 0, 3).shape == (3, 2)


def test_a_policy_with_a_class_twice_gets_no_budget():
    policy = Scores(0, 1.0)
    policy.classes = np.array([(2, 2), (4, 2), (4, 2), (8, 4), (8, 8), (16, 16)], np.uint8)
    with pytest.raises(BudgetError, match="'scores' has a class twice"):
        Budget(policy, GEOMETRY, CONTEXT, 16, kv_bits=4.0)
