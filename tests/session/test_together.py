"""Several sessions in one pass: each gets what it gets alone, to the bit where products are kvq's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.controller.policies import Policy
from kvq.exporter.export import export
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import ContextError, KvqError, PolicyError, PromptError
from kvq.runtime.kv.records import stored_tokens
from tests.native.test_stepwise import stored_bytes

KINDS = [
    {"policy": "int8"}, {"policy": "int4", "sink": 0}, {"policy": "mixed", "prefill": "stepwise"},
    {"policy": "rule"}, {"kv_bits": 7}, {"policy": "k8v4", "recent": 3, "prefill_chunk": 32},
]  # fmt: skip


@pytest.fixture(scope="module")
def int8_model(tiny_checkpoint, tmp_path_factory):
    """A bundle whose products are kvq's own on the native backend."""
    from kvq.composition import open_bundle

    return open_bundle(export(str(tiny_checkpoint), tmp_path_factory.mktemp("int8") / "tiny", weights="int8").path)


@st.composite
def schedules(draw):
    """Kinds of some sessions, and rounds: per round and session how many tokens it gets, 0 for none."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=5))
    sizes = st.sampled_from((0, 1, 1, 1, 2, 5, 17, 40))
    count = len(kinds)
    rounds = draw(st.lists(st.lists(sizes, min_size=count, max_size=count), min_size=2, max_size=8))
    return kinds, rounds, draw(st.integers(0, 7)), draw(st.integers(0, 2**32 - 1))


def states(session):
    session.store.settle()
    return stored_tokens(session.store).chosen.tolist(), stored_bytes(session.store), session.tokens


@pytest.mark.slow
@given(schedule=schedules())
@settings(max_examples=40, deadline=None)
def test_sessions_together_are_to_the_bit_what_they_are_alone(int8_model, schedule):
    """Mixed policies, budgets, lengths, chunk sizes and forks; some are read a prompt while others decode."""
    kinds, rounds, forked, seed = schedule
    generator = np.random.default_rng(seed)
    together, alone = ([int8_model.session(backend="native", **kind) for kind in kinds] for _ in range(2))
    for number, sizes in enumerate(rounds):
        if number == forked:
            together, alone = ([*group, group[0].fork()] for group in (together, alone))
        sizes = [*sizes, *[1] * (len(together) - len(sizes))]
        feeds = [(i, generator.integers(1, 512, size)) for i, size in enumerate(sizes) if size]
        found = int8_model.step([(together[i], ids) for i, ids in feeds])
        for logits, (i, ids) in zip(found, feeds, strict=True):
            np.testing.assert_array_equal(logits, alone[i].append(ids))
            np.testing.assert_array_equal(together[i].last_logits, alone[i].last_logits)
    assert [states(session) for session in together] == [states(session) for session in alone]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_on_products_of_onnxruntime_logits_are_close_and_choices_the_same(tiny_model, backend):
    generator = np.random.default_rng(1)
    together, alone = ([tiny_model.session(backend=backend, **kind) for kind in KINDS] for _ in range(2))
    for sizes in [(60, 3, 20, 40, 1, 9), (1,) * 6, (1, 1, 30, 1, 17, 1), (1,) * 6]:
        feeds = [generator.integers(1, 512, size) for size in sizes]
        found = tiny_model.step(list(zip(together, feeds, strict=True)))
        expected = [session.append(ids) for session, ids in zip(alone, feeds, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
    chosen = [[states(session)[0] for session in group] for group in (together, alone)]
    assert chosen[0] == chosen[1]


def test_sessions_of_both_backends_and_all_logits(int8_model):
    sessions = [int8_model.session(backend=backend) for backend in ("native", "numpy", "native")]
    feeds = [[5, 6, 7], [8], [9, 10]]
    found = int8_model.step(list(zip(sessions, feeds, strict=True)), all_logits=True)
    for session, ids, logits in zip(sessions, feeds, found, strict=True):
        expected = int8_model.session(backend=session.backend.name).append(ids, all_logits=True)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert sessions[0].stats().decode_sessions is None
    int8_model.step([(sessions[0], [1]), (sessions[2], [2])])
    assert sessions[0].stats().decode_sessions == 2
    assert "2.0 sessions a pass" in sessions[0].stats().line()


class Fails(Policy):
    """A policy that chooses what does not exist."""

    name = "fails"

    def choose(self, features):
        return np.full((len(features.positions), 2), 99, np.uint8)


def test_an_error_of_one_session_harms_no_other(int8_model):
    good, bad, other = (int8_model.session(policy) for policy in ("int8", Fails(), "int4"))
    with pytest.raises(PolicyError, match="'fails' chose"):
        int8_model.step([(good, [1, 2, 3]), (bad, [4, 5]), (other, [6])])
    np.testing.assert_array_equal(good.last_logits, int8_model.session("int8").append([1, 2, 3]))
    np.testing.assert_array_equal(other.last_logits, int8_model.session("int4").append([6]))
    assert not bad.tokens


def test_numbers_that_are_none_are_one_sessions_alone(int8_model, monkeypatch):
    from kvq.runtime.compute.backends.native_joint import NativeJointPass

    forward = NativeJointPass.forward

    def spoilt(self, spans):
        residual = forward(self, spans)
        residual[1] = np.nan
        return residual

    monkeypatch.setattr(NativeJointPass, "forward", spoilt)
    good, bad = (int8_model.session(backend="native") for _ in range(2))
    with pytest.raises(KvqError, match="NaN, infinite or huge"):
        int8_model.step([(good, [1]), (bad, [2])])
    assert (len(good.tokens), len(bad.tokens)) == (1, 0)


def test_what_does_not_fit_is_refused_before_anything_is_appended(int8_model, tiny_model):
    session, other = int8_model.session(), int8_model.session()
    context = int8_model.architecture.context
    for feeds, error, text in (
        ([(session, [1]), (other, [1] * (context + 1))], ContextError, "do not fit"),
        ([(session, [1]), (other, [])], PromptError, "empty"),
        ([(session, [1]), (session, [2])], PromptError, "once a pass"),
        ([(session, [1]), (tiny_model.session(), [2])], PromptError, "one model"),
    ):
        with pytest.raises(error, match=text):
            int8_model.step(feeds)
        assert not session.tokens
    assert int8_model.step([]) == []
