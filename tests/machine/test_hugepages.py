"""Memory on huge pages: what is asked for, that contents stay, that arrays of a slab are nobody else's."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvq
from kvq.runtime.errors import BackendError
from kvq.runtime.machine import hugepages
from kvq.runtime.machine.hugepages import HUGE_PAGE, LEAST_CUT, SLAB
from tests.tools.command_line import assert_one_line_error, run

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=8)


def ascending(pieces):
    """Disjoint ascending ranges from (gap, length) pairs."""
    found, at = [], 0
    for gap, length in pieces:
        found.append((at + gap, at + gap + length))
        at += gap + length
    return found


def covered(pieces):
    return {x for begin, end in pieces for x in range(begin, end)}


@given(ranges, ranges)
def test_what_was_there_before_is_left_out(now, before):
    now, before = ascending(now), ascending(before)
    left = list(hugepages.without(now, before))
    assert covered(left) == covered(now) - covered(before)
    assert sum(end - begin for begin, end in left) == len(covered(left))


@given(ranges, st.randoms())
def test_only_whole_huge_pages_without_wide_gaps(pieces, random):
    pieces = ascending(pieces)
    joined = covered(pieces)
    for (_, end), (begin, _) in pairwise(pieces):
        joined |= covered([(end, begin)]) if begin - end <= 2 else set()
    random.shuffle(pieces)
    with pytest.MonkeyPatch.context() as patch:  # pages small enough to count bytes
        patch.setattr(hugepages, "HUGE_PAGE", 4)
        patch.setattr(hugepages, "GAP", 2)
        found = list(hugepages.whole_pages(pieces))
    assert covered(found) == {x for x in joined if covered([(x // 4 * 4, x // 4 * 4 + 4)]) <= joined}


def test_collapsing_leaves_contents_alone():
    memory = np.random.default_rng(0).integers(0, 256, 5 * HUGE_PAGE, np.uint8)
    before = memory.copy()
    done = hugepages.collapse([(memory.ctypes.data, memory.ctypes.data + memory.nbytes)])
    assert done in range(0, memory.nbytes + 1, HUGE_PAGE)
    assert np.array_equal(memory, before)


def test_memory_that_came_within_a_block_is_found():
    with hugepages.new_memory() as done:
        memory = np.ones(16 * HUGE_PAGE, np.uint8)
    if not done[0]:
        pytest.skip("this system gives no huge pages")
    assert 14 * HUGE_PAGE <= done[0] <= 32 * HUGE_PAGE
    assert memory.all()


@given(st.lists(st.tuples(st.integers(1, 3 * LEAST_CUT), st.booleans()), min_size=1, max_size=20))
def test_cuts_are_zero_apart_and_last_when_others_go(wanted):
    kept = []
    for number, (size, keep) in enumerate(wanted):
        array = hugepages.zeros((size,), np.float16)
        assert (array.dtype, array.shape) == (np.float16, (size,))
        assert not array.any()
        array[...] = number + 1
        if keep:
            kept.append((array, number + 1))
        del array
    for array, value in kept:
        assert (array == value).all()


def test_what_does_not_fit_a_slab_is_an_array_all_the_same():
    large = hugepages.zeros((SLAB + 1,))
    large[-1] = 1
    assert large.shape == (SLAB + 1,)
    assert not large[:-1].any()


def test_results_are_the_same_without_and_stats_say_which(tiny_model, monkeypatch):
    ids = np.arange(60) % tiny_model.architecture.vocab
    logits = tiny_model.session("mixed").append(ids)
    monkeypatch.setenv("KVQ_HUGE_PAGES", "off")
    model = kvq.load(tiny_model.path)
    session = model.session("mixed")
    assert np.array_equal(session.append(ids), logits)
    assert session.stats().huge_weight_nbytes == 0


def test_an_unknown_setting_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("KVQ_HUGE_PAGES", "yes")
    with pytest.raises(BackendError, match="KVQ_HUGE_PAGES=yes is not known; use auto or off"):
        kvq.load(tiny_model.path)
    assert_one_line_error(run(tiny_model.path, "-n", "1", "x", env={"KVQ_HUGE_PAGES": "yes"}), "KVQ_HUGE_PAGES", code=2)


def test_where_no_slab_can_be_had_memory_is_asked_for_as_numpy_does(monkeypatch):
    def none() -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(hugepages, "_slab", None)
    monkeypatch.setattr(hugepages, "_Slab", none)
    array = hugepages.zeros((LEAST_CUT,))
    assert not array.any()
    array[:] = 1  # and it is our own


@pytest.mark.parametrize(
    "name", [b"a\rb", b"a\x0b\x1c\x85b", b"\xff\xfe", b"x\r7f00-7fff rw-p 0 0:0 0", b" "], ids=repr
)
def test_names_of_mapped_files_are_no_lines_of_their_own(name, tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    file = b"2000-3000 r--p 00000000 fe:00 42 /" + name
    maps.write_bytes(b"\n".join([b"1000-2000 rw-p 00000000 00:00 0 ", file, b"3000-4000 rw-p 0 00:00 0 [heap]", b""]))
    monkeypatch.setattr(hugepages, "_MAPS", maps)
    assert hugepages._anonymous() == [(0x1000, 0x2000), (0x3000, 0x4000)]
