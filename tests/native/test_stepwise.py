"""A stepwise prefill gives what appending token by token gives: precisions, bytes, text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvq
from kvq.controller.policies import Policy
from kvq.runtime.compute.backends import BACKENDS, make_backend
from kvq.runtime.errors import NonFiniteError, PolicyError
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.kv.slots import TILE_TOKENS
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry
from tests.tools.command_line import assert_one_line_error, run
from tests.tools.kvdata import (
    HEAD_DIMS,
    examples,
    fill,
    random_feedback,
    random_tokens,
    random_turns,
    seeds,
    with_profiles,
)

IDS = np.random.default_rng(3).integers(1, 512, 200).tolist()
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def whole_tiles(page):
    """A page with the same tokens whose layers share no tiles."""
    return page if page.whole_tiles else page.copy(page.count, TILE_TOKENS)


def stored_bytes(store):
    """All that a store holds: precisions in order, and the bytes of pages and window."""
    pages = [
        (str(bits), [part.tobytes() for page in bucket.pages if page.count for part in whole_tiles(page).parts()])
        for bits, bucket in store.buckets.items()
        if bucket.count
    ]
    window = store.window
    slots = window.slots(store.length - window.count, store.length)
    ring = [part.encoded(slots) for part in (window.keys, window.values)]
    return pages, [x.tobytes() for part in ring for x in part], window.chosen[slots].tolist()


@st.composite
def situations(draw):
    """A text partly in the store, its next tokens, and queries: [layers, tokens, heads, head_dim]."""
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_DIMS))
    geometry = Geometry(draw(st.integers(1, 3)), kv_heads, head_dim)
    if draw(st.booleans()):
        geometry = with_profiles(geometry, draw(seeds))
    recent = draw(st.sampled_from((1, 3, 16, 40)))
    new = draw(st.integers(1, recent + 1))
    tokens = random_tokens(draw(seeds), geometry, draw(st.sampled_from((0, 1, 9, 16, 17, 33, 200))) + new)
    heads = kv_heads * draw(st.sampled_from((1, 3, 4)))
    shape = (geometry.layers, new, heads, head_dim)
    query = np.random.default_rng(draw(seeds)).standard_normal(shape, np.float32)
    feedback = draw(st.one_of(st.none(), seeds.map(lambda seed: random_feedback(seed, geometry))))
    turns = draw(st.one_of(st.none(), seeds.map(lambda seed: random_turns(seed, geometry))))
    return geometry, recent, draw(st.sampled_from((0, 4))), tokens, query, {"feedback": feedback, "turns": turns}


def new_parts(tokens, new, layer):
    """Keys and values [new, kv_heads, head_dim] of the last tokens in one layer."""
    return [np.ascontiguousarray(x[layer, :, -new:].transpose(1, 0, 2)) for x in (tokens.keys, tokens.values)]


@pytest.mark.slow
@every_backend
@given(situation=situations())
@examples(120)
def test_rows_are_those_of_single_tokens(backend, situation):
    geometry, recent, sink, tokens, query, with_keys = situation
    new, old = query.shape[1], len(tokens.bits) - query.shape[1]
    one, many = (make_backend(backend) for _ in range(2))
    codecs = one.codecs._replace(**with_keys)
    single, whole = (fill(KVStore(geometry, recent, sink, codecs), tokens.part(0, old)) for _ in range(2))
    expected, found = np.empty_like(query), np.empty_like(query)
    squares = np.zeros((2, *query.shape[:3]), np.float32)
    for layer in range(geometry.layers):
        key, value = new_parts(tokens, new, layer)
        many.attend_stepwise(query[layer], key, value, whole, layer, found[layer], squares[0, layer])
    for t in range(new):
        for layer in range(geometry.layers):
            key, value = (x[t : t + 1] for x in new_parts(tokens, new, layer))
            out = expected[layer, t : t + 1]
            one.attend(query[layer, t : t + 1], key, value, single, layer, out, squares[1, layer, t : t + 1])
        single.append(*tokens.part(old + t, old + t + 1))
    if backend == "native":
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(squares[0], squares[1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(tokens.values).max())
    np.testing.assert_allclose(squares[0], squares[1], rtol=1e-5)
    whole.append(*tokens.part(old, old + new))
    assert stored_bytes(whole) == stored_bytes(single)
    assert whole.account() == single.account()


@pytest.mark.slow
@every_backend
@given(situation=situations(), other=seeds)
@examples(40)
def test_rows_that_come_to_nothing_leave_no_trace(backend, situation, other):
    """A pass that fails, and then other tokens: the store is one that the first ones never came near."""
    geometry, recent, sink, tokens, query, with_keys = situation
    new, old = query.shape[1], len(tokens.bits) - query.shape[1]
    part = make_backend(backend)
    codecs = part.codecs._replace(**with_keys)
    store, untouched = (fill(KVStore(geometry, recent, sink, codecs), tokens.part(0, old)) for _ in range(2))
    before = stored_bytes(store)
    for layer in range(geometry.layers):
        part.attend_stepwise(query[layer], *new_parts(tokens, new, layer), store, layer, np.empty_like(query[layer]))
    assert stored_bytes(store) == before
    assert store.length == old
    twin = store.fork(codecs)
    following = random_tokens(other, geometry, 90)
    for each in (store, untouched, twin):
        fill(each, following, cuts=(1, 40))
        each.trim(old + 30)
    assert stored_bytes(store) == stored_bytes(twin) == stored_bytes(untouched)
    assert store.nbytes == twin.nbytes == untouched.nbytes


class Looks(Policy):
    """Precision by a feature that what earlier tokens read decides."""

    name = "looks"
    needs = frozenset({"confidence"})

    def __str__(self) -> str:
        return self.name

    def choose(self, features):
        rank = (features.get("confidence") * 300).astype(int) % 4
        return np.array([[2, 2], [4, 2], [8, 8], [16, 16]], np.uint8)[rank]


def precisions(session):
    session.store.settle()
    return stored_tokens(session.store).chosen


@every_backend
@pytest.mark.parametrize("policy", [Looks(), "rule", "int4", "mixed"], ids=str)
@pytest.mark.parametrize(("recent", "sink", "sizes"), [(16, 0, [200]), (16, 3, [50, 1, 1, 148]), (3, 0, [199, 1])])
def test_a_session_chooses_and_says_what_it_does_token_by_token(backend, policy, recent, sink, sizes, tiny_model):
    options = {"recent": recent, "sink": sink, "backend": backend, "prefill": "stepwise"}
    session, single = (tiny_model.session(policy, **options) for _ in range(2))
    at = 0
    for size in sizes:
        logits = session.append(IDS[at : at + size])
        at += size
    for token in IDS:
        expected = single.append([token])
    np.testing.assert_array_equal(precisions(session), precisions(single))
    # Products of many rows are summed in another order than those of one.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)


def test_all_logits_are_those_of_single_tokens(tiny_model):
    session, single = (tiny_model.session("int2", prefill="stepwise") for _ in range(2))
    rows = session.append(IDS[:90], all_logits=True)
    np.testing.assert_allclose(rows, [single.append([token]) for token in IDS[:90]], rtol=0, atol=2e-3)
    chunked = tiny_model.session("int2", prefill="chunked").append(IDS[:90], all_logits=True)
    assert np.abs(chunked - rows).max() > 0.02, "at 2 bits it makes a difference"


@pytest.mark.slow
def test_the_embedded_model_chooses_for_a_chunk_what_it_chooses_token_by_token():
    """With int8 activations: where the last bit of a product differs, a choice in some hundreds may."""
    model = kvq.load()
    ids = np.random.default_rng(0).integers(1, model.architecture.vocab, 300)
    for policy in ("adaptive", "paper"):
        session, single = model.session(policy), model.session(policy)
        session.append(ids)
        for token in ids:
            single.append([token])
        assert session.stats().prefill == "stepwise"
        same = (precisions(session) == precisions(single)).all(1)
        assert same.mean() >= 0.99, policy


@pytest.mark.parametrize(
    ("policy", "prefill", "runs"),
    [
        ("int4", "auto", "chunked"), ("random", "auto", "chunked"), ("mixed", "auto", "chunked"),
        ("rule", "auto", "stepwise"), (Looks(), "auto", "stepwise"), ("rule", "chunked", "chunked"),
        ("fp16", "stepwise", "stepwise"),
    ],
    ids=str,
)  # fmt: skip
def test_what_runs_is_reported_and_kept(policy, prefill, runs, tiny_model, tmp_path):
    session = tiny_model.session(policy, prefill=prefill)
    session.append(IDS[:40])
    assert session.stats().prefill == session.fork().stats().prefill == runs
    assert ("stepwise prefill" in session.stats().line()) == (runs == "stepwise")
    session.save(tmp_path / "kept.kvq")
    own = policy if isinstance(policy, Policy) else None
    assert tiny_model.load_session(tmp_path / "kept.kvq", own).stats().prefill == runs
    assert tiny_model.load_session(tmp_path / "kept.kvq", own, prefill="stepwise").stats().prefill == "stepwise"


@pytest.mark.slow
def test_an_unknown_prefill_is_refused(tiny_model, tiny_bundle):
    with pytest.raises(PolicyError, match="no prefill 'fast'; use one of: auto, stepwise, chunked"):
        tiny_model.session(prefill="fast")
    done = run(tiny_bundle, "--prefill", "fast", "Hello")
    assert_one_line_error(done, "no prefill 'fast'", "chunked", code=2)


@every_backend
def test_values_that_cannot_be_stored_leave_the_session_as_it_was(backend, tiny_model, monkeypatch):
    session, untouched = (tiny_model.session("rule", backend=backend) for _ in range(2))
    for part in (session, untouched):
        part.append(IDS[:60])
    pass_of_16 = type(session.backend.forward_pass(tiny_model.engine, 16, stepwise=True))
    forward = pass_of_16.forward

    def spoiled(self, ids, store, row_squares=None):
        forward(self, ids, store, row_squares)
        self.keys[0, 0, -1, 0] = 1e9

    with monkeypatch.context() as patch:
        patch.setattr(pass_of_16, "forward", spoiled)
        with pytest.raises(NonFiniteError):
            session.append(IDS[60:76])
    assert session.tokens == untouched.tokens
    np.testing.assert_array_equal(session.append(IDS[100:150]), untouched.append(IDS[100:150]))
    assert stored_bytes(session.store) == stored_bytes(untouched.store)
