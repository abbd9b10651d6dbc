"""The lookup of drafts against a search through the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.session.lookup import LONGEST, NGRAM, PLACES, Lookup


def searched(text):
    """What `Lookup.find` promises, by looking at every place."""
    end = len(text)
    places = [i for i in range(NGRAM, end) if text[i - NGRAM : i] == text[end - NGRAM :]]
    best = 0, 0
    for place in sorted(places, reverse=True)[:PLACES]:
        same = NGRAM
        while same < LONGEST and same < place and text[place - same - 1] == text[end - same - 1]:
            same += 1
        if same > best[1]:
            best = place, same
    return best


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=4))
def test_it_finds_what_a_search_finds(parts):
    lookup = Lookup()
    for part in parts:
        lookup.extend(part)
        assert lookup.find() == searched(lookup.tokens)
    assert lookup.tokens == [token for part in parts for token in part]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data(), st.integers(1, 30))
def test_drafts_are_what_followed_and_go_round_where_the_text_ends(text, data, most):
    lookup = Lookup()
    lookup.extend(text)
    place = data.draw(st.integers(0, len(text) - 1))
    cycle = text[place:]
    assert lookup.drafts(place, most) == (cycle * most)[:most]
