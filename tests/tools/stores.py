"""Texts for stores, drawn by hypothesis, and what a store holds as bytes that can be compared."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.tools.kvdata import ODD_COUNTS, WIDTHS, geometries, random_tokens, seeds

recents = st.sampled_from((0, 1, 3, 16, 40))
sinks = st.sampled_from((0, 1, 4, 20))
counts = st.one_of(st.sampled_from(ODD_COUNTS), st.integers(0, 200))
cuts = st.lists(st.floats(0, 1), max_size=12)  # where a text is cut, as fractions of its length
widths = st.sampled_from(((4,), (2, 4), (2, 16), WIDTHS))


@st.composite
def texts(draw):
    """A geometry and tokens for it."""
    geometry = draw(geometries)
    return geometry, random_tokens(draw(seeds), geometry, draw(counts), draw(widths))


def at(fractions, count):
    """Cut positions in a text of that many tokens."""
    return [round(f * count) for f in fractions]


def page_arrays(page):
    sides = [slots for side in (page.keys, page.values) for slots in side.slots]
    return [array for slots in sides for array in (slots.codes, slots.scales)] + [page.positions]


def page_bytes(page, count=None):
    """The used bytes of the first `count` tokens of a page, array by array."""
    count = page.count if count is None else count
    sides = (page.keys, page.values)
    parts = [array for side in sides for part in side.encoded(slice(0, count)) for array in part]
    return [x.tobytes() for x in parts] + [page.positions[:count].tobytes()]


def window_content(store):
    """The ring in order of position: keys, values, bits."""
    window = store.window
    slots = window.slots(store.length - window.count, store.length)
    parts = [array.tobytes() for part in (window.keys, window.values) for array in part.encoded(slots)]
    return *parts, window.chosen[slots].tobytes()


def content(store):
    """Everything a store holds, as comparable bytes: length, window, pages of every non-empty bucket."""
    pages = {
        pair: [(page.capacity, page.count, page_bytes(page)) for page in bucket.pages]
        for pair, bucket in store.buckets.items()
        if bucket.count
    }
    return store.length, window_content(store), pages


def positions(store, pair):
    return [p for page in store.buckets[pair].pages for p in page.positions[: page.count].tolist()]
