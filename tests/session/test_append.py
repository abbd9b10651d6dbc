"""Appending: any chunking gives the same logits, all logits, ids that are none, the end of the context."""

from __future__ import annotations

import numpy as np
import pytest

from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.compute.binding import Bound
from kvq.runtime.errors import ContextError, NonFiniteError, PromptError
from tests.tools.sessions import BLIND, CONTEXT, EXACT, IDS, ROUNDED, VOCAB, appended, greedy, positions, rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 2e30, -3e38])
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
        with pytest.raises(NonFiniteError, match=r"huge logits .*; check the checkpoint"):
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
