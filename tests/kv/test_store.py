"""The KV store: nothing stored ever changes, chunking does not matter, bytes and tokens add up."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.errors import NonFiniteError
from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.pages import PAGE_TOKENS, BucketBytes
from kvq.runtime.kv.sides import last_capacity
from kvq.runtime.kv.slots import TILE_TOKENS, Encoded
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import CODECS, NUMPY
from kvq.runtime.precision.codecs.uniform import WINDOWS
from kvq.runtime.precision.table import Geometry, Pair
from tests.tools.kvdata import (
    WIDTHS,
    Tokens,
    arrays_in,
    as_read,
    examples,
    fill,
    filled_store,
    protected,
    random_tokens,
)
from tests.tools.stores import (
    at,
    content,
    cuts,
    page_arrays,
    page_bytes,
    positions,
    recents,
    sinks,
    texts,
    window_content,
)

SMALL = Geometry(layers=2, kv_heads=2, head_dim=8)


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, sink=sinks, cuts=cuts, fraction=st.floats(0, 1))
@examples(120)
def test_accounted_bytes_add_up_to_all_arrays_of_the_store(text, recent, sink, cuts, fraction, bits):
    geometry, tokens = text
    store = filled_store(geometry, tokens, recent, sink, at(cuts, len(tokens.bits)), protect_bits=bits)
    full = store.nbytes
    for length in (store.length, round(fraction * store.length)):
        store.trim(length)
        assert sum(row["nbytes"] for row in store.account().values()) == store.nbytes
        assert sum(x.nbytes for x in arrays_in(store)) == store.nbytes
        assert store.peak_nbytes == full >= store.nbytes


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, sink=sinks, cuts=cuts)
@examples(80)
def test_accounted_tokens_add_up_to_the_length(text, recent, sink, cuts, bits):
    geometry, tokens = text
    store = filled_store(geometry, tokens, recent, sink, at(cuts, len(tokens.bits)), protect_bits=bits)
    assert sum(row["tokens"] for row in store.account().values()) == store.length == len(tokens.bits)


@given(text=texts(), recent=recents, bits=protected)
@examples(80)
def test_accounted_slack_is_the_free_room(text, recent, bits):
    geometry, tokens = text
    store = filled_store(geometry, tokens, recent, protect_bits=bits)
    account = store.account()
    for pair, bucket in store.buckets.items():
        ids = [id_ for of_layer in geometry.by_layer(pair) for id_ in of_layer]
        codes = sum(CODECS[id_].code_bytes(geometry.head_dim) for id_ in ids)
        scales = 2 * sum(id_ != 16 for id_ in ids)
        each = geometry.kv_heads * (codes + scales) + 4
        slack = account[str(pair)]["slack_nbytes"]
        assert slack == BucketBytes(pair, geometry)[bucket.count] - bucket.count * each
        if all(page.whole_tiles for page in bucket.pages):
            assert slack == sum(page.capacity - page.count for page in bucket.pages) * each
    slots = -(-recent // TILE_TOKENS) * TILE_TOKENS
    vector = NUMPY.windows[bits].vector_bytes(geometry.head_dim)
    unused = 2 * geometry.layers * geometry.kv_heads * vector * (slots - min(recent, store.length))
    assert account["recent"]["slack_nbytes"] == unused + 2 * (recent - min(recent, store.length))


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, sink=sinks, cuts=cuts)
@examples(120)
def test_chunking_changes_nothing_that_is_stored(text, recent, sink, cuts, bits):
    geometry, tokens = text
    whole = filled_store(geometry, tokens, recent, sink, protect_bits=bits)
    chunked = filled_store(geometry, tokens, recent, sink, at(cuts, len(tokens.bits)), protect_bits=bits)
    assert content(chunked) == content(whole)


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, sink=sinks)
@examples(30)
def test_token_by_token_stores_what_one_append_stores(text, recent, sink, bits):
    geometry, tokens = text
    count = len(tokens.bits)
    single = filled_store(geometry, tokens, recent, sink, range(1, count), protect_bits=bits)
    assert content(single) == content(filled_store(geometry, tokens, recent, sink, protect_bits=bits))


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, sink=sinks, cuts=cuts)
@examples(80)
def test_stored_bytes_never_change_when_tokens_are_added(text, recent, sink, cuts, bits):
    geometry, tokens = text
    store = KVStore(geometry, recent, sink)
    edges = [0, *sorted(at(cuts, len(tokens.bits))), len(tokens.bits)]
    stored = []
    for start, stop in pairwise(edges):
        store.append(*tokens.part(start, stop))
        for page, count, before in stored:
            assert page_bytes(page, count) == before
        stored = [(p, p.count, page_bytes(p)) for b in store.buckets.values() for p in b.pages]


@given(text=texts(), recent=recents, bits=protected, cuts=cuts)
@examples(80)
def test_growth_opens_pages_and_keeps_the_arrays_of_those_of_full_size(text, recent, cuts, bits):
    geometry, tokens = text
    store = KVStore(geometry, recent)
    edges = [0, *sorted(at(cuts, len(tokens.bits))), len(tokens.bits)]
    for start, stop in pairwise(edges):
        before = {
            pair: [page_arrays(p) for p in bucket.pages if p.capacity == PAGE_TOKENS]
            for pair, bucket in store.buckets.items()
        }
        store.append(*tokens.part(start, stop))
        for pair, pages in before.items():
            now = [page_arrays(page) for page in store.buckets[pair].pages]
            for old_arrays, arrays in zip(pages, now, strict=False):
                assert all(a is b for a, b in zip(old_arrays, arrays, strict=True))


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, cuts=cuts, fraction=st.floats(0, 1), again=st.booleans())
@examples(80)
def test_pages_follow_from_the_count_of_a_bucket(text, recent, cuts, fraction, again, bits):
    geometry, tokens = text
    store = filled_store(geometry, tokens, recent, cuts=at(cuts, len(tokens.bits)), protect_bits=bits)
    if again:
        store.trim(round(fraction * store.length))
        store.append(*tokens.part(store.length, len(tokens.bits)))
    for bucket in store.buckets.values():
        assert all(page.count == page.capacity == PAGE_TOKENS for page in bucket.pages[:-1])
        for page in bucket.pages[-1:]:
            assert page.capacity == last_capacity(page.count, geometry.layers)


def test_a_bucket_token_costs_codes_scales_and_a_tag():
    bucket = Bucket(Pair(4, 2), SMALL)
    assert bucket.token_bytes == 2 * 2 * (8 // 2 + 2 + 4 + 2) + 4  # eight codes of 2 bits take one word


def test_a_page_keeps_the_tokens_before_an_append():
    bucket = Bucket(Pair(8, 8), SMALL)
    parts = [[Encoded(*CODECS[8].encode(np.full((2, 2, 10, 8), x, np.float32)))] for x in (1, 2)]
    bucket.append(parts[0], parts[0], np.arange(10))
    before = page_bytes(bucket.pages[0])
    bucket.append(parts[1], parts[1], np.arange(10, 20))
    assert page_bytes(bucket.pages[0], 10) == before
    assert bucket.count == 20


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, sink=sinks, cuts=cuts)
@examples(80)
def test_every_position_is_stored_once_at_the_precision_asked_for(text, recent, sink, cuts, bits):
    geometry, tokens = text
    count = len(tokens.bits)
    store = filled_store(geometry, tokens, recent, sink, at(cuts, count), protect_bits=bits)
    expected = {}
    for position in range(max(0, count - recent)):
        pair = (bits,) * 2 if position < sink else tuple(tokens.bits[position].tolist())
        expected.setdefault(pair, []).append(position)
    assert {pair: positions(store, pair) for pair, b in store.buckets.items() if b.count} == expected


@given(text=texts(), recent=recents, bits=protected, sink=sinks, cuts=cuts)
@examples(80)
def test_the_ring_holds_the_newest_tokens(text, recent, sink, cuts, bits):
    geometry, tokens = text
    count = len(tokens.bits)
    store = filled_store(geometry, tokens, recent, sink, at(cuts, count), protect_bits=bits)
    newest = tokens.part(max(0, count - recent), count)
    assert store.window.count == len(newest.bits)
    encoded = [array.tobytes() for x in newest[:2] for array in NUMPY.windows[bits].encode(x)]
    due = newest.bits.copy()
    due[: max(0, sink - max(0, count - recent))] = bits
    assert window_content(store) == (*encoded, due.tobytes())


def test_sink_tokens_are_stored_at_16_bits_and_the_caller_s_bits_stay_as_they_were():
    tokens = random_tokens(3, SMALL, 40, (2,))
    store = filled_store(SMALL, tokens, recent=4, sink=5, cuts=[3])
    assert positions(store, Pair(16, 16)) == [0, 1, 2, 3, 4]
    assert positions(store, Pair(2, 2)) == list(range(5, 36))
    assert (tokens.bits == 2).all()


@pytest.mark.slow
@given(
    text=texts(),
    recent=recents,
    bits=protected,
    sink=sinks,
    extra=st.integers(1, 40),
    where=st.floats(0, 1, exclude_max=True),
    side=st.integers(0, 1),
    bad=st.sampled_from((np.nan, np.inf, -np.inf)),
)
@examples(120)
def test_a_refused_append_leaves_the_store_as_it_was(text, recent, sink, extra, where, side, bad, bits):
    geometry, tokens = text
    store = filled_store(geometry, tokens, recent, sink, protect_bits=bits)
    rejected = random_tokens(1, geometry, extra)
    rejected[side][-1, -1, int(where * extra), -1] = bad
    before, account, peak = content(store), store.account(), store.peak_nbytes
    with pytest.raises(NonFiniteError):
        store.append(*rejected)
    assert content(store) == before
    assert {k: v for k, v in store.account().items() if v["tokens"]} == {
        k: v for k, v in account.items() if v["tokens"]
    }
    assert store.peak_nbytes == peak


@given(text=texts(), recent=recents, bits=protected, extra=st.integers(1, 20))
@examples(40)
def test_a_store_goes_on_after_a_refused_append(text, recent, extra, bits):
    geometry, tokens = text
    more = random_tokens(2, geometry, extra)
    store = filled_store(geometry, tokens, recent, protect_bits=bits)
    poisoned = Tokens(np.full_like(more.keys, np.nan), more.values, more.bits)
    with pytest.raises(NonFiniteError):
        store.append(*poisoned)
    untouched = filled_store(geometry, tokens, recent, protect_bits=bits)
    assert content(fill(store, more)) == content(fill(untouched, more))


@pytest.mark.parametrize("protect_bits", [8, 16])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_the_window_took_can_leave_it(width, protect_bits):
    # A refusal must come with the append of the bad token: later, the session could never go on.
    largest = WINDOWS[protect_bits].limit or 65504
    token = np.tile(np.array([largest] + [43200] * 7, np.float32), (2, 2, 1, 1))
    store = KVStore(SMALL, recent=2, protect_bits=protect_bits)
    with pytest.raises(NonFiniteError):
        store.append(token * np.float32(1.001), token, np.array([[width, width]], np.uint8))
    store.append(token, token, np.array([[width, width]], np.uint8))
    store.append(*random_tokens(0, SMALL, 2))
    assert positions(store, Pair(width, width)) == [0]


@pytest.mark.slow
@given(
    text=texts(),
    recent=recents,
    bits=protected,
    sink=sinks,
    cuts=cuts,
    limit=st.sampled_from((128, 129, 200, 1024)),
)
@examples(120)
def test_blocks_return_every_token_once_as_its_codec_decodes_it(text, recent, sink, cuts, limit, bits):
    geometry, tokens = text
    count = len(tokens.bits)
    store = filled_store(geometry, tokens, recent, sink, at(cuts, count), protect_bits=bits)
    expected = as_read(tokens, recent, sink, bits, geometry)
    for layer in range(geometry.layers):
        rows = []
        for keys, values in store.blocks(layer, limit):
            assert keys.dtype == values.dtype == np.float32
            assert keys.shape == values.shape
            assert 0 < keys.shape[1] <= limit
            rows += list(np.concatenate([keys, values], axis=-1).transpose(1, 0, 2))
        wanted = np.concatenate([x[layer] for x in expected], axis=-1).transpose(1, 0, 2)
        assert sorted(row.tobytes() for row in rows) == sorted(row.tobytes() for row in wanted)


@given(limit=st.integers(1, PAGE_TOKENS - 1), recent=recents, bits=protected)
@examples(30)
def test_blocks_are_never_larger_than_a_limit_below_the_page_size(limit, recent, bits):
    store = filled_store(SMALL, random_tokens(0, SMALL, 300, (4,)), recent, protect_bits=bits)
    sizes = [keys.shape[1] for keys, _ in store.blocks(0, limit)]
    assert max(sizes) <= limit
    assert sum(sizes) == 300
