"""Attention over buckets, window and new tokens equals dense softmax attention over what the cache decodes to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.compute.backends import BACKENDS, make_backend, numpy_backend
from kvq.runtime.errors import BackendError
from kvq.runtime.kv.pages import PAGE_TOKENS
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry
from tests.tools.kvdata import (
    HEAD_DIMS,
    ODD_COUNTS,
    WIDTHS,
    Tokens,
    as_read,
    examples,
    filled_store,
    protected,
    random_tokens,
    seeds,
)

STORE_LENGTHS = (*ODD_COUNTS, 300)
# Of the largest value. Where scores are taken by integer dot products queries are rounded to 16 bits, and weights of
# values, which adds a noise of 1.6e-5 of an output's root mean square.
TOLERANCE, ROUNDED_TOLERANCE = 1e-5, dict.fromkeys(("avx512", "amx", "avxvnni", "avx2", "dotprod"), 1.2e-4)

every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def dense_attention(query, keys, values):
    """Plain causal softmax attention in float64: output [tokens, heads, head_dim], squares [tokens, heads].

    query [tokens, heads, head_dim]; keys, values [kv_heads, cached + tokens, head_dim].
    """
    tokens, heads, head_dim = query.shape
    group = heads // keys.shape[0]
    cached = keys.shape[1] - tokens
    out, squares = np.empty(query.shape), np.empty((tokens, heads))
    for t in range(tokens):
        seen = cached + t + 1
        for h in range(heads):
            k, v = (x[h // group, :seen].astype(np.float64) for x in (keys, values))
            scores = k @ query[t, h].astype(np.float64) / np.sqrt(head_dim)
            row = np.exp(scores - scores.max())
            row /= row.sum()
            out[t, h], squares[t, h] = row @ v, (row**2).sum()
    return out, squares


def new_tokens(seed, tokens, heads, kv_heads, head_dim):
    """Query, key, value float32 of new tokens: views into larger arrays, as a graph segment yields them."""
    rng = np.random.default_rng(seed)
    query_key = rng.standard_normal((tokens, heads + kv_heads, head_dim), np.float32)
    value = rng.standard_normal((tokens, kv_heads, head_dim), np.float32)
    return query_key[:, :heads], query_key[:, heads:], value


def attend(backend, query, key, value, store, layer=0):
    """Output and row squares of a backend."""
    out = np.full(query.shape, np.nan, np.float32)
    squares = np.full(query.shape[:2], np.nan, np.float32)
    make_backend(backend).attend(query, key, value, store, layer, out, squares)
    return out, squares


def all_tokens(cached, new):
    """Cached [kv_heads, n, head_dim] and new [tokens, kv_heads, head_dim] in one array per KV head."""
    return np.concatenate([cached, new.transpose(1, 0, 2)], axis=1)


def assert_equals_dense(backend, query, key, value, store, read, layer=0):
    """The backend's result against the dense one over the tensors `read` (keys, values of all layers)."""
    out, squares = attend(backend, query, key, value, store, layer)
    values = all_tokens(read[1][layer], value)
    expected, expected_squares = dense_attention(query, all_tokens(read[0][layer], key), values)
    tolerance = ROUNDED_TOLERANCE.get(make_backend(backend).detail, TOLERANCE)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * np.abs(values).max())
    np.testing.assert_allclose(squares, expected_squares, rtol=1e-5 if tolerance == TOLERANCE else 2 * tolerance)


@st.composite
def situations(draw):
    """A store of any mixture, what it decodes to, and new tokens."""
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from(HEAD_DIMS))
    geometry = Geometry(2, kv_heads, head_dim)
    recent, sink = draw(st.sampled_from((0, 1, 5, 16, 64))), draw(st.sampled_from((0, 4)))
    widths = draw(st.sampled_from((*((w,) for w in WIDTHS), (2, 5), WIDTHS)))
    cached = random_tokens(draw(seeds), geometry, draw(st.sampled_from(STORE_LENGTHS)), widths)
    protect_bits = draw(protected)
    store = filled_store(geometry, cached, recent, sink, protect_bits=protect_bits)
    heads = kv_heads * draw(st.sampled_from((1, 3, 4)))
    new = new_tokens(draw(seeds), draw(st.integers(1, 9)), heads, kv_heads, head_dim)
    return new, store, as_read(cached, recent, sink, protect_bits)


@pytest.mark.slow
@every_backend
@given(situation=situations(), layer=st.integers(0, 1))
@examples(150)
def test_any_mixture_equals_dense_attention(backend, situation, layer):
    new, store, read = situation
    assert_equals_dense(backend, *new, store, read, layer)


@every_backend
@pytest.mark.parametrize("cached", STORE_LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (8, 2), (4, 4)])
def test_every_store_length_and_grouping_equals_dense_attention(backend, cached, heads, kv_heads):
    geometry = Geometry(1, kv_heads, 16)
    tokens = random_tokens(cached, geometry, cached)
    new = new_tokens(heads, 2, heads, kv_heads, 16)
    assert_equals_dense(backend, *new, filled_store(geometry, tokens, recent=5), as_read(tokens, recent=5))


@every_backend
def test_a_new_token_does_not_see_the_ones_after_it(backend):
    geometry = Geometry(1, 2, 16)
    store = filled_store(geometry, random_tokens(0, geometry, 20), recent=4)
    query, key, value = new_tokens(1, 6, 6, 2, 16)
    out, squares = attend(backend, query, key, value, store)
    first, first_squares = attend(backend, query[:3], key[:3], value[:3], store)
    np.testing.assert_allclose(out[:3], first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(squares[:3], first_squares, rtol=1e-6)


@every_backend
def test_the_first_token_of_a_text_attends_to_itself_alone(backend):
    query, key, value = new_tokens(2, 1, 6, 2, 24)
    out, squares = attend(backend, query, key, value, KVStore(Geometry(1, 2, 24)))
    np.testing.assert_array_equal(out, np.repeat(value, 3, axis=1))
    np.testing.assert_array_equal(squares, np.ones((1, 6)))


@every_backend
def test_row_squares_are_optional(backend):
    geometry = Geometry(1, 2, 16)
    store = filled_store(geometry, random_tokens(0, geometry, 20), recent=4)
    new = new_tokens(1, 3, 4, 2, 16)
    out = np.full((3, 4, 16), np.nan, np.float32)
    make_backend(backend).attend(*new, store, 0, out)
    np.testing.assert_array_equal(out, attend(backend, *new, store)[0])


@every_backend
def test_attending_changes_neither_the_store_nor_its_inputs(backend):
    geometry = Geometry(1, 2, 16)
    tokens = random_tokens(0, geometry, 40)
    store = filled_store(geometry, tokens, recent=4)
    new = new_tokens(1, 3, 4, 2, 16)
    before = [x.copy() for x in new]
    first = attend(backend, *new, store)
    second = attend(backend, *new, store)
    for a, b in zip((*new, *first), (*before, *second), strict=True):
        np.testing.assert_array_equal(a, b)


@every_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("new_score", [1e4, -1e4])
def test_scores_of_magnitude_1e4_do_not_overflow(backend, sign, new_score):
    # Scores are exact in float32: the query is 8 on one channel after scaling, keys are whole numbers there.
    geometry = Geometry(1, 1, 16)
    tokens = random_tokens(7, geometry, 100, (16,))
    keys = np.zeros_like(tokens.keys)
    keys[0, 0, :, 0] = sign * (1250 - np.arange(100) // 3)
    tokens = Tokens(keys, tokens.values, tokens.bits)
    query, key, value = np.zeros((2, 3, 16), np.float32), np.zeros((2, 1, 16), np.float32), np.ones((2, 1, 16))
    query[..., 0], key[..., 0] = 32, new_score / 8
    store = filled_store(geometry, tokens, recent=5)
    assert_equals_dense(backend, query, key, value.astype(np.float32), store, as_read(tokens, recent=5))


@pytest.mark.parametrize("recent", [0, 16, 400])
def test_blocks_of_a_long_store_merge_into_dense_attention(monkeypatch, recent):
    monkeypatch.setattr(numpy_backend, "BLOCK", PAGE_TOKENS)
    geometry = Geometry(1, 2, 16)
    tokens = random_tokens(9, geometry, 1500, (4, 8))
    store = filled_store(geometry, tokens, recent)
    assert len(list(store.blocks(0, PAGE_TOKENS))) >= 1500 // PAGE_TOKENS
    assert_equals_dense("numpy", *new_tokens(3, 4, 6, 2, 16), store, as_read(tokens, recent))


@every_backend
def test_a_store_longer_than_a_block_equals_dense_attention(backend):
    geometry = Geometry(1, 1, 8)
    tokens = random_tokens(10, geometry, 2 * numpy_backend.BLOCK + 77, (4,))
    store = filled_store(geometry, tokens, recent=16)
    assert_equals_dense(backend, *new_tokens(4, 2, 3, 1, 8), store, as_read(tokens, recent=16))


@pytest.mark.parametrize("order", [1, -1])
def test_partial_softmax_merges_blocks_in_any_order(order):
    rng = np.random.default_rng(11)
    scores = (rng.standard_normal((2, 3, 90)) * 20).astype(np.float32)
    values = rng.standard_normal((2, 90, 8), np.float32)
    blocks = [slice(0, 1), slice(1, 40), slice(40, 90)][::order]
    softmax = numpy_backend.PartialSoftmax(2, 3, 8)
    for block in blocks:
        softmax.add(scores[:, :, block].copy(), values[:, block])
    row = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    row /= row.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(softmax.weighted / softmax.total, row @ values, rtol=0, atol=1e-5)
    np.testing.assert_allclose(softmax.squares / softmax.total**2, (row**2).sum(-1, keepdims=True), rtol=1e-5)


def test_auto_takes_the_backend_of_the_highest_priority(monkeypatch):
    monkeypatch.delenv("KVQ_BACKEND", raising=False)
    best = max(backend.priority for backend in BACKENDS.values())
    assert make_backend().priority == make_backend("auto").priority == best


def test_the_environment_names_the_backend_when_the_caller_does_not(monkeypatch):
    monkeypatch.setenv("KVQ_BACKEND", "abacus")
    assert make_backend("numpy").name == "numpy"
    with pytest.raises(BackendError, match="abacus"):
        make_backend()


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(BackendError, match=r"'abacus'.*numpy") as error:
        make_backend("abacus")
    assert "\n" not in str(error.value)
