"""Sessions: appending, trimming, accounting, and independence of each other."""

from __future__ import annotations

import gc
import json
import threading
import tracemalloc

import numpy as np
import pytest

import kvq
from kvq.controller.policies import POLICIES, Policy, make_policy
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.compute.binding import Bound
from kvq.runtime.errors import BackendError, ContextError, NonFiniteError, PolicyError, PromptError
from kvq.runtime.machine.threads import configure
from tests.tools.kvdata import arrays_in

CONTEXT = 256
VOCAB = 512
IDS = np.random.default_rng(0).integers(1, VOCAB, 120).tolist()
# 16 bits everywhere and a window over the whole text: nothing but the order of sums may differ.
EXACT = {"policy": "fp16", "recent": CONTEXT}
# New tokens see each other unrounded and all others at 16 bits, so the chunking moves logits (here
# of standard deviation 2) a little.
ROUNDED = 1e-3
# Tokens that have left the window are halves, which round nine times coarser. Measured: 0.004.
HALF = 0.01
# Policies that look at positions only; the features that `rule` reads depend on what earlier chunks read.
BLIND = ["fp16", "int8", "int4", "int2", "k8v4", "k4v2", "mixed", "random"]


def greedy(session, prompt, count, **options):
    """The tokens of a greedy generation."""
    responses = session.generate(prompt, max_tokens=count, temperature=0, ignore_eos=True, **options)
    return [response.token for response in responses]


def appended(session, ids, sizes):
    """Append ids in parts of those sizes (the last size repeats); the last logits."""
    sizes, at = list(sizes), 0
    while at < len(ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits = session.append(ids[at : at + size])
        at += size
    return logits


def rows(session):
    """Tokens of the store by precision, empty ones left out."""
    return {name: row["tokens"] for name, row in session.store.account().items() if row["tokens"]}


def positions(session):
    """Which tokens of the text the store holds at which precision, and how many are in the window."""
    found = {
        str(bits): [int(at) for page in bucket.pages for at in page.positions[: page.count]]
        for bits, bucket in session.store.buckets.items()
        if bucket.count
    }
    return found | {"recent": session.store.window.count}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_logit_that_is_no_number_ends_the_step(tiny_model, monkeypatch, backend, wrong, tokens):
    session = tiny_model.session("int4", backend=backend)
    session.append(IDS[:20])
    run, places = Bound.run, iter((0, VOCAB - 1, 300))

    def spoilt(bound):
        run(bound)
        if "logits" in bound._arrays[1]:
            bound._arrays[1]["logits"][tokens - 1, next(places)] = wrong

    for _ in range(3):
        monkeypatch.setattr(Bound, "run", spoilt)
        with pytest.raises(NonFiniteError, match="infinite logits; check the checkpoint"):
            session.append(IDS[20 : 20 + tokens], all_logits=True)
        assert session.store.length == len(session.tokens) == 20
        monkeypatch.setattr(Bound, "run", run)
    expected = tiny_model.session("int4", backend=backend)
    expected.append(IDS[:20])
    wanted = expected.append(IDS[20 : 20 + tokens], all_logits=True)
    np.testing.assert_array_equal(session.append(IDS[20 : 20 + tokens], all_logits=True), wanted)


@pytest.mark.parametrize("sizes", [[1], [7], [16], [17], [64], [120], [1, 119], [100, 1], [3, 1, 40, 5]], ids=str)
@pytest.mark.parametrize("prefill_chunk", [5, 128])
def test_any_chunking_gives_the_same_logits(tiny_model, sizes, prefill_chunk):
    expected = tiny_model.session(**EXACT).append(IDS)
    session = tiny_model.session(**EXACT, prefill_chunk=prefill_chunk)
    np.testing.assert_allclose(appended(session, IDS, sizes), expected, atol=ROUNDED)
    assert session.tokens == IDS
    assert session.store.length == len(IDS)


@pytest.mark.parametrize("sizes", [[1], [13], [50, 1, 7]], ids=str)
def test_any_chunking_leads_to_the_same_greedy_tokens(tiny_model, sizes):
    expected = greedy(tiny_model.session(**EXACT), IDS[:60], 20)
    session = tiny_model.session(**EXACT)
    appended(session, IDS[:59], sizes)
    assert greedy(session, IDS[59:60], 20) == expected


@pytest.mark.parametrize("policy", BLIND)
@pytest.mark.parametrize("recent", [0, 16])
def test_chunking_does_not_change_which_precision_a_token_gets(tiny_model, policy, recent):
    sessions = [tiny_model.session(policy, recent=recent) for _ in range(2)]
    appended(sessions[0], IDS, [120])
    appended(sessions[1], IDS, [1, 30, 5])
    assert positions(sessions[0]) == positions(sessions[1])


@pytest.mark.parametrize("prefill_chunk", [1, 9, 32, 40, 128])
def test_all_logits_are_one_row_a_token_and_agree_with_token_by_token(tiny_model, prefill_chunk):
    ids = IDS[:40]
    session = tiny_model.session(**EXACT, prefill_chunk=prefill_chunk)
    logits = session.append(ids, all_logits=True)
    assert logits.shape == (40, VOCAB)
    assert logits.dtype == np.float32
    single = tiny_model.session(**EXACT)
    np.testing.assert_allclose(logits, [single.append([token]) for token in ids], atol=ROUNDED)
    last = tiny_model.session(**EXACT, prefill_chunk=prefill_chunk).append(ids)
    assert last.shape == (VOCAB,)
    np.testing.assert_allclose(logits[-1], last, atol=1e-5)


@pytest.mark.parametrize("policy", ["rule", "mixed"])
@pytest.mark.parametrize("prefill_chunk", [7, 33, 128])
def test_all_logits_do_not_change_what_is_stored(tiny_model, policy, prefill_chunk):
    sessions = [tiny_model.session(policy, prefill_chunk=prefill_chunk) for _ in range(2)]
    every = sessions[0].append(IDS, all_logits=True)
    last = sessions[1].append(IDS)
    np.testing.assert_allclose(every[-1], last, atol=1e-5)
    assert rows(sessions[0]) == rows(sessions[1])


def test_all_logits_after_a_generation_are_those_of_the_new_ids_alone(tiny_model):
    session = tiny_model.session(**EXACT)
    generated = greedy(session, IDS[:10], 3)
    assert session.pending == generated[-1:]
    logits = session.append(IDS[10:15], all_logits=True)
    assert logits.shape == (5, VOCAB)
    assert session.tokens == [*IDS[:10], *generated, *IDS[10:15]]
    expected = tiny_model.session(**EXACT).append(session.tokens, all_logits=True)
    np.testing.assert_allclose(logits, expected[-5:], atol=ROUNDED)


@pytest.mark.parametrize(
    "ids",
    [
        [],
        np.array([], np.int64),
        [VOCAB],
        [3, 4, VOCAB + 1000],
        [-1],
        [5, -3],
        [2**63],
        np.array([2**64 - 1], np.uint64),
        np.array([1.0, 2.0]),
        [1.5],
        [True, False],
        ["1"],
        [None],
        [[1, 2], [3, 4]],
        np.zeros((1, 3), np.int64),
        3,
        [[1], [2, 3]],
    ],
    ids=repr,
)
def test_ids_that_are_none_are_refused_and_nothing_is_appended(tiny_model, ids):
    session = tiny_model.session(**EXACT)
    session.append(IDS[:5])
    with pytest.raises(PromptError) as caught:
        session.append(ids)
    assert "\n" not in str(caught.value)
    assert session.tokens == IDS[:5]
    np.testing.assert_allclose(session.append(IDS[5:9]), tiny_model.session(**EXACT).append(IDS[:9]), atol=ROUNDED)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_integer_arrays_of_any_width_are_ids(tiny_model, dtype):
    ids = np.arange(1, 20, dtype=dtype)
    expected = tiny_model.session(**EXACT).append(ids.tolist())
    session = tiny_model.session(**EXACT)
    np.testing.assert_array_equal(session.append(ids), expected)
    assert all(type(token) is int for token in session.tokens)


def test_more_tokens_than_the_context_are_refused_and_the_session_goes_on(tiny_model):
    session = tiny_model.session(**EXACT)
    long = (IDS * 3)[: CONTEXT + 1]
    with pytest.raises(ContextError, match=r"257 tokens do not fit into the context of 256, 0 used"):
        session.append(long)
    assert session.tokens == []
    session.append(long[:250])
    assert session.room == 6
    with pytest.raises(ContextError, match=r"7 tokens do not fit into the context of 256, 250 used"):
        session.append(long[:7])
    assert session.store.length == len(session.tokens) == 250
    session.append(long[250:256])
    assert session.room == 0
    with pytest.raises(ContextError):
        session.append([1])
    session.trim(10)
    assert session.room == CONTEXT - 10
    expected = tiny_model.session(**EXACT).append([*long[:10], 7])
    np.testing.assert_allclose(session.append([7]), expected, atol=ROUNDED)


@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (16, 0), (16, 4), (3, 30), (CONTEXT, 0), (1000, 1000)])
@pytest.mark.parametrize("policy", ["fp16", "k4v2", "mixed", "rule"])
def test_stats_add_up_to_the_arrays_and_the_tokens(tiny_model, policy, recent, sink):
    session = tiny_model.session(policy, recent=recent, sink=sink)
    for count in (1, 15, 16, 40):
        session.append(IDS[:count])
        stats = session.stats()
        assert (
            sum(row["nbytes"] for row in stats.precisions.values())
            == stats.kv_nbytes
            == sum(a.nbytes for a in arrays_in(session.store))
        )
        assert sum(row["tokens"] for row in stats.precisions.values()) == stats.tokens == len(session.tokens)
        assert all(0 <= row["slack_nbytes"] <= row["nbytes"] for row in stats.precisions.values())
        assert stats.kv_peak_nbytes >= stats.kv_nbytes
        assert stats.kv_bits == pytest.approx(8 * stats.kv_nbytes / (2 * 3 * 4 * 8 * stats.tokens))
    assert stats.precisions["recent"]["tokens"] == min(recent, CONTEXT, len(session.tokens))
    assert stats.decode_tokens + stats.prefill_tokens == len(session.tokens)
    assert stats.decode_tokens == 1


def test_sink_tokens_are_stored_at_16_bits(tiny_model):
    session = tiny_model.session("int2", recent=0, sink=5)
    session.append(IDS[:30])
    assert rows(session) == {"k16v16": 5, "k2v2": 25}


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(
    "policy", sorted(POLICIES.keys() - {"adaptive", "paper", "auto"})
)  # need training, or are another
def test_stats_report_the_policy_and_backend_that_ran(tiny_model, policy, backend):
    session = tiny_model.session(policy, recent=4, sink=2, backend=backend)
    assert session.stats().kv_bits is None
    session.append(IDS[:30])
    session.append(IDS[30:31])
    stats = session.stats()
    assert (stats.policy, stats.backend, stats.recent, stats.sink) == (policy, backend, 4, 2)
    assert stats.threads == configure(None)
    assert stats.ms_per_token > 0
    assert stats.gb_per_s > 0
    assert stats.prefill_tokens_per_s > 0


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_stats_are_json_and_one_line(tiny_model, tokens):
    session = tiny_model.session("mixed")
    if tokens:
        session.append(IDS[:tokens])
    stats = session.stats()
    assert json.loads(json.dumps(stats.as_dict(), allow_nan=False)) == stats.as_dict()
    line = stats.line()
    assert "\n" not in line
    assert f"{tokens} tokens cached" in line
    assert "policy mixed" in line


def test_the_peak_stays_when_tokens_are_forgotten(tiny_model):
    session = tiny_model.session("int8", recent=4)
    session.append(IDS)
    peak = session.stats().kv_nbytes
    session.trim(8)
    stats = session.stats()
    assert stats.kv_nbytes < peak
    assert stats.kv_peak_nbytes >= peak


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"adaptive", "paper"}))  # these need training
def test_every_policy_runs_and_two_runs_are_identical(tiny_model, policy):
    runs = []
    for _ in range(2):
        session = tiny_model.session(policy, recent=4)
        logits = session.append(IDS[:50], all_logits=True)
        runs.append((logits, greedy(session, IDS[50:51], 8), rows(session)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_a_policy_object_is_used_as_it_is(tiny_model):
    class Thirds(Policy):
        name = "thirds"

        def choose(self, features):
            return np.where(features.positions[:, None] % 3 == 0, [[8, 4]], [[4, 2]]).astype(np.uint8)

    session = tiny_model.session(Thirds(), recent=0, sink=0)
    session.append(IDS[:30])
    assert rows(session) == {"k8v4": 10, "k4v2": 20}
    assert session.stats().policy == "thirds"


def test_unknown_policies_and_options_are_refused(tiny_model):
    with pytest.raises(PolicyError, match="unknown policy 'int5'"):
        tiny_model.session("int5")
    with pytest.raises(PolicyError, match="with a ready policy object"):
        make_policy(make_policy("random"), seed=1)
    with pytest.raises(PolicyError, match="does not take the options"):
        make_policy("mixed", seed=1)
    assert make_policy("random", seed=1).seed == 1


@pytest.mark.parametrize(("name", "value"), [("recent", -1), ("sink", -1), ("prefill_chunk", 0)])
def test_session_options_out_of_range_are_refused(tiny_model, name, value):
    with pytest.raises(PolicyError, match=f"{name} must be an integer of at least {value + 1}, got {value}"):
        tiny_model.session(**{name: value})


# Around the borders of a window of 16 and of the pages (16, 32, ... tokens).
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 33, 63, 64, 65, 79, 80])
@pytest.mark.parametrize(
    ("policy", "recent", "tolerance"),
    [
        ("fp16", 16, HALF),
        ("int8", CONTEXT, ROUNDED),
        # Without a window nothing is run again: only the order of sums over the buckets may differ.
        ("fp16", 0, 1e-4),
        ("mixed", 0, 1e-4),
        ("rule", 0, 1e-4),
        # Tokens run again read neighbours as stored that they first read from the window: at few bits
        # the logits differ by what the quantizer costs, but never which token has which precision.
        ("mixed", 16, None),
        ("k4v2", 1, None),
    ],
)
def test_a_trimmed_session_equals_one_that_never_saw_the_rest(tiny_model, policy, recent, tolerance, length):
    trimmed = tiny_model.session(policy, recent=recent)
    appended(trimmed, IDS[:80], [1])
    trimmed.trim(length)
    assert trimmed.tokens == IDS[:length]
    assert trimmed.store.length == length
    fresh = tiny_model.session(policy, recent=recent)
    if length:
        appended(fresh, IDS[:length], [1])
    assert positions(trimmed) == positions(fresh)
    for ids in (IDS[100:103], IDS[103:104]):
        result, expected = trimmed.append(ids), fresh.append(ids)
        if tolerance is not None:
            np.testing.assert_allclose(result, expected, atol=tolerance, rtol=0)
        assert positions(trimmed) == positions(fresh)
    assert trimmed.tokens == fresh.tokens


def test_trimming_again_and_again_keeps_the_window_full(tiny_model):
    session = tiny_model.session("int4", recent=16)
    session.append(IDS[:80])
    for length in (80, 70, 69, 40, 16, 5, 0):
        session.trim(length)
        assert rows(session).get("recent", 0) == min(16, length)
        assert sum(rows(session).values()) == length


@pytest.mark.parametrize("length", [-1, 11, 1000])
def test_trimming_to_a_length_that_is_not_there_is_refused(tiny_model, length):
    session = tiny_model.session()
    session.append(IDS[:10])
    with pytest.raises(ContextError, match=f"cannot trim to {length} tokens"):
        session.trim(length)
    assert session.tokens == IDS[:10]


def test_trimming_forgets_the_rarity_of_forgotten_tokens(tiny_model):
    trimmed, fresh = (tiny_model.session("rule", recent=0) for _ in range(2))
    appended(trimmed, [*IDS[:20], *[7] * 30], [1])
    trimmed.trim(20)
    appended(fresh, IDS[:20], [1])
    ids = [7, 8, 7, 9] * 5
    np.testing.assert_allclose(appended(trimmed, ids, [1]), appended(fresh, ids, [1]), atol=1e-4)
    assert positions(trimmed) == positions(fresh)


RUNS = [("fp16", IDS[:30]), ("mixed", IDS[20:70]), ("rule", IDS[50:55]), ("int4", IDS[5:90])]


@pytest.fixture(scope="module")
def single_runs(tiny_model):
    """The greedy tokens of each of RUNS alone."""
    return [greedy(tiny_model.session(policy), prompt, 25) for policy, prompt in RUNS]


def test_interleaved_sessions_do_not_see_each_other(tiny_model, single_runs):
    options = {"max_tokens": 25, "temperature": 0, "ignore_eos": True}
    streams = [tiny_model.session(policy).generate(prompt, **options) for policy, prompt in RUNS]
    tokens = [[] for _ in RUNS]
    for _ in range(25):
        for run, stream in zip(tokens, streams, strict=True):
            run.append(next(stream).token)
    assert tokens == single_runs


def test_sessions_in_four_threads_at_once_give_their_single_runs(tiny_model, single_runs):
    tokens: list = [None] * len(RUNS)
    start = threading.Barrier(len(RUNS))

    def work(index: int) -> None:
        policy, prompt = RUNS[index]
        start.wait()
        tokens[index] = [greedy(tiny_model.session(policy), prompt, 25) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(RUNS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens == [[run] * 3 for run in single_runs]


# The numpy backend's scratch for one block, 2 * 4 heads * 1024 tokens * 8 * 4 bytes = 262 kB, is made anew for
# every layer and dropped; beside it 24 to 41 kB were measured. Twenty steps kept 3 to 7 kB beyond the store
# (Python integers, views of pages): a kilobyte kept per step, such as the logits of 2 kB, would show.
STEP_PEAK_NBYTES = 262_144 + 80_000
STEPS_KEPT_NBYTES = 20_000


@pytest.mark.parametrize("policy", ["fp16", "mixed", "rule"])
def test_a_decode_step_allocates_little_and_keeps_nothing(tiny_model, policy):
    session = tiny_model.session(policy, backend="numpy")
    session.append(IDS[:95])
    for token in IDS[95:100]:
        session.append([token])
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store = session.store.nbytes
        for token in IDS[100:120]:
            session.append([token])
        peak = tracemalloc.get_traced_memory()[1] - before
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before - (session.store.nbytes - store)
    finally:
        tracemalloc.stop()
    assert peak < STEP_PEAK_NBYTES
    assert kept < STEPS_KEPT_NBYTES


def test_an_unknown_backend_is_named_with_the_known_ones(tiny_model, monkeypatch):
    with pytest.raises(BackendError, match=r"no attention backend 'nonsense' here; use auto or one of: .*numpy"):
        tiny_model.session(backend="nonsense")
    monkeypatch.setenv("KVQ_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        tiny_model.session()
    assert tiny_model.session(backend="numpy").stats().backend == "numpy"  # an argument goes before the variable


def test_the_environment_chooses_the_backend(tiny_model, monkeypatch):
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    assert tiny_model.session().stats().backend == "numpy"


def test_auto_takes_the_backend_of_the_highest_priority(tiny_model, monkeypatch):
    monkeypatch.delenv("KVQ_BACKEND", raising=False)
    best = max(backend.priority for backend in BACKENDS.values())
    for name in (None, "auto"):
        assert BACKENDS[tiny_model.session(backend=name).stats().backend].priority == best


def test_another_number_of_threads_in_one_process_is_refused(tiny_bundle, tiny_model):
    running = tiny_model.engine.threads
    assert kvq.load(tiny_bundle, threads=running).engine.threads == running
    with pytest.raises(BackendError, match=f"on {running} threads, cannot change to {running + 1}"):
        kvq.load(tiny_bundle, threads=running + 1)
    with pytest.raises(BackendError, match="threads must be at least 1 and at most 256, got 0"):
        kvq.load(tiny_bundle, threads=0)
