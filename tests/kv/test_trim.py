"""Trimming a store: earlier tokens keep their bytes, and a text goes on as if the rest had never been."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry
from tests.tools.kvdata import examples, fill, filled_store, protected, random_tokens, seeds
from tests.tools.stores import at, content, cuts, page_bytes, positions, recents, sinks, texts

SMALL = Geometry(layers=2, kv_heads=2, head_dim=8)


@pytest.mark.slow
@given(text=texts(), recent=recents, bits=protected, cuts=cuts, fraction=st.floats(0, 1))
@examples(80)
def test_trim_keeps_the_earlier_tokens_and_their_bytes(text, recent, cuts, fraction, bits):
    geometry, tokens = text
    count = len(tokens.bits)
    store = filled_store(geometry, tokens, recent, cuts=at(cuts, count), protect_bits=bits)
    length = round(fraction * count)
    before = {pair: [(p, page_bytes(p)) for p in bucket.pages] for pair, bucket in store.buckets.items()}
    in_ring = range(count - store.window.count, count)
    ring = dict(zip(in_ring, store.window.slots(in_ring.start, in_ring.stop), strict=True))
    store.trim(length)
    kept = [p for pair in store.buckets for p in positions(store, pair)]
    in_window = list(range(length - store.window.count, length))
    assert sorted(kept + in_window) == list(range(length))
    assert in_window == [p for p in ring if p < length]
    assert [store.window.slots(p, p + 1)[0] for p in in_window] == [ring[p] for p in in_window]
    for pair, pages in before.items():
        for page, (old, stored) in zip(store.buckets[pair].pages, pages, strict=False):
            assert page is old or page.capacity < old.capacity
            assert page_bytes(old, page.count) == page_bytes(page)
            assert all(x.startswith(y) for x, y in zip(stored[-1:], page_bytes(page)[-1:], strict=True))


@pytest.mark.slow
@given(text=texts(), more=seeds, sink=sinks, fraction=st.floats(0, 1), extra=st.integers(0, 60))
@examples(120)
def test_continuing_after_a_trim_equals_never_having_had_the_rest(text, more, sink, fraction, extra):
    geometry, tokens = text
    length = round(fraction * len(tokens.bits))
    other = random_tokens(more, geometry, extra)
    trimmed = filled_store(geometry, tokens, recent=0, sink=sink)
    trimmed.trim(length)
    fill(trimmed, other)
    fresh = filled_store(geometry, tokens.part(0, length), recent=0, sink=sink)
    assert content(trimmed) == content(fill(fresh, other))


@pytest.mark.slow
@given(
    text=texts(),
    more=seeds,
    recent=recents,
    bits=protected,
    sink=sinks,
    fraction=st.floats(0, 1),
    extra=st.integers(0, 60),
)
@examples(120)
def test_continuing_after_a_trim_with_a_refilled_window_equals_a_fresh_store(
    text, more, recent, sink, fraction, extra, bits
):
    geometry, tokens = text
    length = round(fraction * len(tokens.bits))
    other = random_tokens(more, geometry, extra)
    trimmed = filled_store(geometry, tokens, recent, sink, protect_bits=bits)
    # Tokens that ought to stand in the window but have left it are fed again, as `Session.trim` does.
    begin = max(0, length - recent)
    keep = length if trimmed.length - trimmed.window.count <= begin else begin
    trimmed.trim(keep)
    fill(trimmed, tokens.part(keep, length))
    fresh = filled_store(geometry, tokens.part(0, length), recent, sink, protect_bits=bits)
    assert content(trimmed) == content(fresh)
    assert content(fill(trimmed, other)) == content(fill(fresh, other))


@pytest.mark.parametrize("recent", [0, 4])
def test_trimming_to_nothing_gives_the_pages_back(recent):
    store = filled_store(SMALL, random_tokens(1, SMALL, 90), recent)
    peak = store.nbytes
    store.trim(0)
    assert store.nbytes == KVStore(SMALL, recent).nbytes
    assert store.length == 0
    assert store.peak_nbytes == peak
    assert list(store.blocks(0, 1024)) == []


@pytest.mark.parametrize("length", [-1, 11])
def test_trimming_outside_the_store_is_refused(length):
    store = filled_store(SMALL, random_tokens(1, SMALL, 10), recent=4)
    before = content(store)
    with pytest.raises(ValueError, match="cannot trim"):
        store.trim(length)
    assert content(store) == before
