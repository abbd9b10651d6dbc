"""Choices put off: a session that asks its policy about many decoded tokens at once stores what it stores anyway."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.controller.policies import TokenFeatures, make_policy
from kvq.controller.policies.rule import RulePolicy
from kvq.runtime.inspect.inspection import inspect_session
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.chooser import MOST_OPEN
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Geometry
from tests.tools.kvdata import examples, random_tokens

IDS = np.random.default_rng(3).integers(1, 512, 256).tolist()
STEPS = st.lists(
    st.tuples(st.sampled_from(["one", "one", "many", "trim", "fork", "save", "inspect"]), st.integers(1, 40)),
    min_size=2,
    max_size=10,
)


class EveryStep(RulePolicy):
    """The same rule, asked at every step."""

    reads = None


@pytest.mark.slow
@given(
    steps=STEPS,
    recent=st.sampled_from([0, 1, 4, 16, 40]),
    sink=st.sampled_from([0, 3]),
    limit=st.sampled_from([{}, {"kv_bits": 9}, {"kv_bits": 11}, {"kv_memory": 200e3}]),
    chunk=st.sampled_from([1, 128]),
)
@examples(40)
def test_precisions_are_those_of_a_session_that_chooses_at_every_step(
    steps, recent, sink, limit, chunk, tiny_model, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "open.kvq"
    options = {"recent": recent, "sink": sink, "prefill_chunk": chunk, **limit}
    late, prompt = tiny_model.session(RulePolicy(), **options), tiny_model.session(EveryStep(), **options)
    for step, amount in steps:
        length = len(late.tokens)
        if step in ("one", "many"):
            ids = IDS[length : length + amount]
            for part in [[i] for i in ids] if step == "one" else [ids][: len(ids)]:
                np.testing.assert_array_equal(late.append(part), prompt.append(part))
        elif step == "trim":
            late.trim(max(0, length - amount))
            prompt.trim(max(0, length - amount))
        elif step == "fork":
            late, prompt = late.fork(), prompt.fork()
        elif step == "save":
            late.save(path)
            late = tiny_model.load_session(path, RulePolicy(), **limit)
        elif late.tokens:
            found, expected = inspect_session(late, features=False), inspect_session(prompt, features=False)
            assert [token.chosen for token in found.tokens] == [token.chosen for token in expected.tokens]
        assert late.store.account() == prompt.store.account()
        assert late.store.window.open <= min(recent, MOST_OPEN)
        assert prompt.store.window.open == 0
    late.store.settle()
    np.testing.assert_array_equal(stored_tokens(late.store).chosen, stored_tokens(prompt.store).chosen)


def test_a_policy_is_asked_once_for_many_steps_and_about_every_token_once(tiny_model):
    asked = []

    class Counting(RulePolicy):
        def score(self, features):
            asked.append(features.positions.tolist())
            return super().score(features)

    session = tiny_model.session(Counting())
    session.append(IDS[:20])
    for token in IDS[20:70]:
        session.append([token])
    session.store.settle()
    assert [len(positions) for positions in asked] == [16, 4, 16, 16, 16, 2]
    assert [position for positions in asked for position in positions] == list(range(70))


def test_a_session_goes_on_after_a_refused_step(tiny_model, monkeypatch):
    """Features kept for a token that was never stored make way for the next one's."""
    session, untouched = (tiny_model.session("rule", kv_bits=8) for _ in range(2))
    for part in (session, untouched):
        part.append(IDS[:30])
        part.append([IDS[30]])
    with monkeypatch.context() as patch:
        patch.setattr(session.store, "append", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.append([IDS[99]])
    for token in IDS[31:80]:
        np.testing.assert_array_equal(session.append([token]), untouched.append([token]))


@pytest.mark.parametrize("sink", [0, 2, 9])
def test_a_store_holds_a_token_whose_precision_comes_later(sink):
    geometry = Geometry(layers=2, kv_heads=1, head_dim=8)
    tokens = random_tokens(5, geometry, 12)
    at_once, later = KVStore(geometry, 4, sink), KVStore(geometry, 4, sink)
    later.choose_open = lambda store, start, count: tokens.bits[start : start + count]
    for i in range(12):
        keys, values, bits = tokens.keys[:, :, i : i + 1], tokens.values[:, :, i : i + 1], tokens.bits[i : i + 1]
        at_once.append(keys, values, bits)
        if later.window.open == 3:
            later.settle()
        later.append(keys, values, None)
        assert later.length == at_once.length == i + 1
        assert (later.window.chosen[later.window.slots(i + 1 - later.window.open, i + 1)] == 0).all()
    later.trim(11)
    at_once.trim(11)
    later.settle()
    np.testing.assert_array_equal(stored_tokens(later).chosen, stored_tokens(at_once).chosen)
    assert later.account() == at_once.account()


@pytest.mark.parametrize("name", ["adaptive", "paper"])
def test_scores_do_not_depend_on_how_many_tokens_are_scored_at_once(name, embedded):
    policy = make_policy(name, embedded.bundle)
    shape, tokens = embedded.architecture, 64
    rng = np.random.default_rng(8)
    heads = rng.standard_normal((2, shape.layers, shape.kv_heads, tokens, shape.head_dim)).astype(np.float32)
    scalars = rng.uniform(0, 1, (4, tokens)).astype(np.float32)
    residual = rng.standard_normal((tokens, shape.hidden)).astype(np.float32)
    ids = rng.integers(0, shape.vocab, tokens)

    def part(cut):
        return TokenFeatures(np.arange(tokens)[cut], *scalars[:, cut], ids[cut], residual[cut], *heads[..., cut, :])

    whole = policy.score(part(slice(None)))
    assert whole.shape == (tokens, len(policy.classes))
    for size in (1, 2, 13, 16, 17):
        cuts = [slice(at, at + size) for at in range(0, tokens, size)]
        np.testing.assert_array_equal(np.concatenate([policy.score(part(cut)) for cut in cuts]), whole)


def test_every_policy_that_is_asked_late_can_be(embedded):
    """The fields it says it reads are enough, and give what all fields give."""
    session = embedded.session("fp16", recent=0)
    logits = np.empty((1, embedded.architecture.vocab), np.float32)
    seen = session.runner.run(np.array(IDS[:1]), session.store, frozenset(), 0, logits)
    every = TokenFeatures(
        np.array([4]), *np.full((4, 1), 0.5, np.float32), seen.ids, seen.residual, seen.keys, seen.values
    )
    for name in ("adaptive", "paper", "rule", "random", "mixed", "k8v4"):
        policy = make_policy(name, embedded.bundle)
        assert policy.reads is not None
        shown = every._replace(**{field: None for field in every._fields if field not in {"positions", *policy.reads}})
        np.testing.assert_array_equal(policy.choose(shown), policy.choose(every))
        assert set(policy.choose(every).ravel().tolist()) <= CODECS.keys()
