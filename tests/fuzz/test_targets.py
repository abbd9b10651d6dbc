"""Targets of the fuzzers, without one: seeds are taken, and what is cut, flipped or spliced is taken or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import SEEDS, TARGETS, held
from tests.tools.kvdata import examples
from tests.tools.work import bounded_work

PIECES = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"true", b"1e999", b"-1", b"9" * 400, b"\\ud800", b"\x00",
          b"\xff", b"{{", b"}}", b"{%", b"%}", b"|", b"~", b"*", b"range(999999)", b"(a+)+", b"loop"]  # fmt: skip
changes = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(PIECES) | st.binary(max_size=6)), max_size=6
)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken(name):
    assert any(held(name, seed) for seed in SEEDS[name])


@pytest.mark.parametrize("name", TARGETS)
@given(seed=st.integers(0, 99), changed=changes, cut=st.floats(0, 1) | st.none())
@examples(120)
def test_what_is_changed_is_taken_or_refused_in_one_line(name, seed, changed, cut):
    data = SEEDS[name][seed % len(SEEDS[name])]
    for place, length, piece in changed:
        at = int(place * len(data))
        data = data[:at] + piece + data[at + length :]
    if cut is not None:
        data = data[: int(cut * len(data))]
    with bounded_work():
        held(name, data)
