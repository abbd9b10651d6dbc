"""Targets of the fuzzers, without one: seeds are taken, and what is cut, flipped or spliced is taken or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import PIECES, SEEDS, TARGETS, changed, held
from tests.tools.kvdata import examples
from tests.tools.work import bounded_work

changes = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(PIECES) | st.binary(max_size=6)), max_size=6
)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken(name):
    assert any(held(name, seed) for seed in SEEDS[name])


@pytest.mark.parametrize("name", TARGETS)
@given(seed=st.integers(0, 99), changes=changes, cut=st.floats(0, 1) | st.none())
@examples(120)
def test_what_is_changed_is_taken_or_refused_in_one_line(name, seed, changes, cut):
    data = changed(SEEDS[name][seed % len(SEEDS[name])], changes, cut)
    with bounded_work():
        held(name, data)
