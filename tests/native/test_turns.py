"""Keys that turn with their position, in C: scores and expanded keys equal numpy's, and what is refused."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.errors import BackendError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native import library
from kvq.runtime.native.turns import TurnsTable
from kvq.runtime.precision.codecs import NUMPY
from kvq.runtime.precision.table import Geometry
from tests.native.test_native import TOLERANCE, every_kernel, native, new_tokens
from tests.tools.kvdata import HEAD_DIMS, WIDTHS, examples, fill, random_tokens, random_turns, seeds


def both(backend, store, new, layer):
    """Rows of a backend and of numpy, with their sums of squares."""
    found = []
    for one in (backend, NumpyAttention()):
        out, squares = np.empty(new[0].shape, np.float32), np.empty(new[0].shape[:2], np.float32)
        one.attend(*new, store, layer, out, squares)
        found.append((out, squares))
    return found


@st.composite
def stores(draw):
    """A store of any mixture, whose layers turn or not, some through windows; and how many heads read a KV head."""
    windows = draw(st.sampled_from(((), (0, 0, 40), (20, 90, 0))))
    geometry = Geometry(3, draw(st.integers(1, 2)), draw(st.sampled_from(HEAD_DIMS)), windows)
    widths = draw(st.sampled_from((*((w,) for w in WIDTHS), (2, 3), WIDTHS)))
    tokens = random_tokens(draw(seeds), geometry, draw(st.sampled_from((0, 1, 15, 33, 150, 420))), widths)
    turns = random_turns(draw(seeds), geometry, draw(st.sampled_from((1, 4, 9))))
    codecs = NUMPY._replace(turns=turns)
    store = fill(KVStore(geometry, draw(st.sampled_from((0, 5, 16))), draw(st.sampled_from((0, 4))), codecs), tokens)
    if draw(st.booleans()):
        store.trim(max(store.least_trim, store.length - draw(st.integers(0, 40))) if store.length else 0)
    return store, draw(st.sampled_from((1, 3, 5)))


@every_kernel
@given(situation=stores(), new=st.sampled_from((1, 1, 2, 17)), layer=st.integers(0, 2), seed=seeds)
@examples(60)
def test_any_mixture_equals_numpy(kernel, situation, new, layer, seed):
    store, group = situation
    given_ = new_tokens(seed, new, group * store.geometry.kv_heads, store.geometry)
    (found, found_squares), (expected, squares) = both(native(kernel), store, given_, layer)
    # What is taken off and added again is larger than the keys: its roundings are, too.
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * TOLERANCE * np.abs(expected).max())
    np.testing.assert_allclose(found_squares, squares, rtol=0, atol=20 * TOLERANCE)


@every_kernel
def test_what_turns_is_not_forgotten(kernel):
    """Without it rows are others by far, at every number of new tokens: the tests above see what they look at."""
    geometry = Geometry(1, 1, 64)
    turns = random_turns(4, geometry)
    store = fill(KVStore(geometry, codecs=NUMPY._replace(turns=turns)), random_tokens(3, geometry, 100, (2, 3)))
    for new in (1, 5):
        given_ = new_tokens(1, new, 3, geometry)
        with_turns = both(native(kernel), store, given_, 0)[0][0]
        store.codecs = NUMPY
        plain = both(native(kernel), store, given_, 0)[0][0]
        store.codecs = NUMPY._replace(turns=turns)
        assert np.abs(with_turns - plain).max() > 0.05


def test_a_table_grows_with_the_text():
    table, turns = TurnsTable(), random_turns(1, Geometry(2, 1, 8))
    assert table.address(None, 10) is None
    sizes = []
    for tokens in (1, 1024, 1025, 5000):
        given_ = library.Turns.from_address(table.address(turns, tokens))
        sizes.append(given_.blocks)
        assert given_.blocks * 16 >= tokens
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 8), ("rows", 2000), ("blocks", 1), ("blocks", 0), ("sets", 0), ("vectors", None), ("which", None)],
)
def test_tables_that_do_not_fit_are_refused(field, value):
    geometry = Geometry(2, 1, 8)
    turns = random_turns(2, geometry)
    address = TurnsTable().address
    bound = address(turns, 100)
    given_ = library.Turns.from_buffer_copy(library.Turns.from_address(bound))
    setattr(given_, field, value)
    forward = library.Pass(2, 1, 1, 8, 1, 0, -1, 1, turns=ctypes.addressof(given_))
    with pytest.raises(BackendError):
        library.check(library.load().kvq_set_pass(ctypes.byref(forward)))
    library.load().kvq_set_pass(None)


def test_a_text_longer_than_the_table_is_refused():
    turns, table = random_turns(2, Geometry(2, 1, 8)), TurnsTable()
    forward = library.Pass(2, 1, 1, 8, 1, 0, -1, 1, position=1024, turns=table.address(turns, 100))
    with pytest.raises(BackendError):
        library.check(library.load().kvq_set_pass(ctypes.byref(forward)))
    library.load().kvq_set_pass(None)
