"""A codec without native kernels on the native backend: everything works, with numpy where it has to, and says so."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvq.controller.policies import Policy
from kvq.runtime.compute.backends import make_backend
from kvq.runtime.compute.backends.native_pass import NativePass
from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.errors import BackendError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native import library
from kvq.runtime.native.codecs import NativeCodec, native_codecs
from kvq.runtime.native.table import PageTable
from kvq.runtime.precision.codecs import CODECS, NUMPY
from kvq.runtime.precision.codecs.uniform import Int4Codec
from kvq.runtime.precision.precision import Precision
from kvq.runtime.precision.table import Geometry, Pair
from tests.native.test_native import KERNELS, LOGITS, every_kernel, native, new_tokens, run, stored_arrays
from tests.native.test_stepwise import stored_bytes
from tests.tools.kvdata import examples, fill, random_tokens, seeds
from tests.tools.three_bits import ThreeBits

IDS = np.random.default_rng(7).integers(1, 512, 200).tolist()
SAID = "numpy for ks3vs3, which it has no kernels for"


@pytest.fixture(autouse=True)
def _three_bits(monkeypatch):
    """The codec in the registry, from which everything else takes it."""
    monkeypatch.setitem(CODECS, 6, ThreeBits())
    # What the native backend leaves to numpy it leaves in passes of many tokens: sessions on either are fed alike here.
    monkeypatch.setattr(NumpyAttention, "rows_alike", True)


class By(Policy):
    """The pair of each token by its position."""

    name = "by position"

    def __init__(self, pair_of, reads=frozenset()):
        self.pair_of, self.reads = pair_of, reads
        self.needs = reads or frozenset()

    def choose(self, features):
        return np.array([self.pair_of(position) for position in features.positions.tolist()], np.uint8)


PAIRS = [(6, 6), (4, 6), (16, 16), (6, 8), (4, 4)]
POLICIES = {
    "all": lambda reads: By(lambda position: (6, 6), reads),
    "mixed": lambda reads: By(lambda position: PAIRS[position % len(PAIRS)], reads),
    "late": lambda reads: By(lambda position: (6, 6) if position >= 60 else (4, 4), reads),
}


@pytest.fixture
def make(tiny_model):
    """A function that makes a session on native under one of the policies."""

    def make(name, stepwise=False, **options):
        options = {"recent": 16, "prefill_chunk": 24, "prefill": "stepwise" if stepwise else "chunked"} | options
        return tiny_model.session(POLICIES[name](options.pop("reads", frozenset())), **{"backend": "native"} | options)

    return make


def on_both(session, path):
    """The session on native and on numpy, from one file."""
    session.save(path)
    load = session.model.load_session
    return [load(path, session.policy, backend=backend) for backend in ("native", "numpy")]


def assert_same(sessions, ids):
    """Both take the tokens, with the same logits, bit for bit, and the same store."""
    found, expected = (session.append(ids, all_logits=True) for session in sessions)
    np.testing.assert_array_equal(found, expected)
    assert stored_bytes(sessions[0].store) == stored_bytes(sessions[1].store)


def written(session):
    return [response.token for response in session.generate(max_tokens=12, temperature=0)]


STEPWISE = pytest.mark.parametrize("stepwise", [False, True], ids=["chunked", "stepwise"])


@STEPWISE
@pytest.mark.parametrize("name", ["all", "mixed"])
@pytest.mark.parametrize("recent", [0, 5, 16])
def test_a_session_on_native_is_the_one_on_numpy(make, name, stepwise, recent, tmp_path):
    """From the first such page on numpy runs every pass, so not a bit may differ."""
    session = make(name, stepwise, recent=recent, sink=3)
    session.append(IDS[:30])
    both = on_both(session, tmp_path / "one.kvq")
    assert_same(both, IDS[30:70])
    for token in IDS[70:90]:
        assert_same(both, [token])
    forks = [part.fork() for part in both]
    assert_same(forks, IDS[90:120])
    assert_same(both, IDS[120:150])
    for part in both:
        part.trim(64)
    assert_same(both, IDS[64:100])
    assert written(both[0]) == written(both[1])
    loaded = on_both(forks[0], tmp_path / "another.kvq")
    assert_same(loaded, IDS[120:160])


@pytest.mark.slow
@STEPWISE
@pytest.mark.parametrize("name", POLICIES)
def test_from_the_first_token_on_the_two_agree(make, name, stepwise):
    """Passes before the first such page are native: they round elsewhere, see test_native."""
    both = [make(name, stepwise, backend=backend) for backend in ("native", "numpy")]
    found, expected = (run(session, IDS, prefill=75) for session in both)
    assert np.abs(found - expected).max() < LOGITS["int4"]
    assert both[0].store.account() == both[1].store.account()


def test_a_policy_that_looks_at_tokens_leaves_choices_open(make, tmp_path):
    """Precisions come late then: when a token leaves the window, or when a stepwise pass needs them."""
    session = make("mixed", stepwise=True, recent=9, reads=frozenset({"confidence"}))
    session.append(IDS[:20])
    both = on_both(session, tmp_path / "one.kvq")
    for start in range(20, 80, 6):
        assert_same(both, IDS[start : start + 5])
        assert_same(both, IDS[start + 5 : start + 6])


def test_statistics_say_what_ran(make):
    session = make("late", recent=16)
    session.append(IDS[:76])
    plain = session.stats().backend_detail
    assert plain in KERNELS
    session.append(IDS[76:77])  # the first of them leaves the window, but no pass has seen it there
    assert session.stats().backend_detail == plain
    session.append(IDS[77:78])
    assert session.stats().backend_detail == f"{plain}; {SAID}"
    assert SAID in session.stats().line()
    assert session.stats().backend == "native"
    session.append(IDS[78:140])
    assert session.stats().backend_detail == f"{plain}; {SAID}"


def test_pairs_are_named_as_they_come(make):
    session = make("mixed", recent=0, sink=0)
    for token in IDS[:12]:
        session.append([token])
    *_, said = session.stats().backend_detail.split("; ")
    assert said == "numpy for ks3vs3, ku4vs3, ks3v8, which it has no kernels for"


def test_a_pass_goes_back_to_native_when_no_such_page_is_left(make, monkeypatch):
    numpy_passes, run_other = [], NativePass._run_other

    def counted(*arguments):
        numpy_passes.append(1)
        run_other(*arguments)

    monkeypatch.setattr(NativePass, "_run_other", counted)
    session = make("late")
    session.append(IDS[:70])
    assert not numpy_passes
    session.append(IDS[70:100])
    session.append(IDS[100:101])
    assert numpy_passes
    session.trim(50)
    numpy_passes.clear()
    session.append(IDS[50:60])
    session.append(IDS[60:61])
    assert not numpy_passes


@every_kernel
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.sampled_from((1, 1, 2, 30))), st.tuples(st.just("trim"), st.floats(0.3, 1))
        ),
        min_size=1,
        max_size=20,
    ),
    recent=st.sampled_from((0, 1, 5, 16)),
    seed=seeds,
)
@settings(parent=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_native_store_holds_numpy_s_bytes(kernel, steps, recent, seed):
    geometry = Geometry(2, 2, 24)
    backend = native(kernel)
    stores = [KVStore(geometry, recent, 2, codecs) for codecs in (backend.codecs, NUMPY)]
    for i, (step, amount) in enumerate([("append", 20), *steps]):
        for store in stores:
            if step == "append":
                fill(store, random_tokens(seed + i, geometry, amount, (6, 4, 16) if i % 3 else (4,)))
            else:
                store.trim(int(amount * store.length))
        for found, expected in zip(*map(stored_arrays, stores), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert stores[0].account() == stores[1].account()


@every_kernel
@pytest.mark.parametrize("due", [6, 4])
@pytest.mark.parametrize("stored", [6, 4])
def test_attending_is_numpy_s_where_it_has_to_be(kernel, stored, due):
    """Foreign are pages, or, for a stepwise pass, also what is about to leave the window."""
    geometry = Geometry(1, 2, 16)
    backend, other = native(kernel), NumpyAttention()
    store = KVStore(geometry, 8, codecs=backend.codecs)
    fill(store, random_tokens(0, geometry, 20, (stored,)))
    fill(store, random_tokens(1, geometry, 8, (due,)))
    query, key, value = new_tokens(2, 4, 4, geometry)
    for name, foreign in (("attend", stored == 6), ("attend_stepwise", 6 in (stored, due))):
        results = []
        backend = native(kernel)
        for one in (backend, other):
            out, squares = np.empty_like(query), np.empty(query.shape[:2], np.float32)
            getattr(one, name)(query, key, value, store, 0, out, squares)
            results.append((out, squares))
        for found, expected in zip(*results, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if foreign else 1e-4)
        assert (SAID in backend.detail) == foreign


def test_only_codecs_that_the_library_knows_are_wrapped(monkeypatch):
    class Other(Int4Codec):  # another way to store, under an id that the library takes for its own
        precision = Precision(4, "4", 8)

    monkeypatch.setitem(CODECS, 4, Other())
    codecs = native_codecs(0)
    assert library.known_precisions() == {16, 8, 5, 3, 2}
    assert {id_ for id_, codec in codecs.by_id.items() if isinstance(codec, NativeCodec)} == {16, 8, 5, 3, 2}
    assert all(isinstance(codec, NativeCodec) for codec in codecs.windows.values())
    assert codecs.by_id[6] is CODECS[6]


def test_the_library_refuses_what_it_does_not_know():
    """Whoever calls it directly gets a named error, before a byte is read."""
    backend = make_backend("native")
    store = fill(KVStore(Geometry(1, 1, 16), 0, codecs=backend.codecs), random_tokens(0, Geometry(1, 1, 16), 5, (6,)))
    table = PageTable()
    table.update(store)
    assert table.foreign == [Pair(6, 6)]
    forward = library.Pass(1, 1, 1, 16, 1, len(table.rows), -1, 1, table.address)
    x = np.zeros(16, np.float32)
    rows = library.Rows(*(x.ctypes.data,) * 4, 16, 16, 16, None)
    loaded = library.load()
    for refused in (
        lambda: loaded.kvq_attend(ctypes.byref(forward), 0, ctypes.byref(rows), None, None),
        lambda: loaded.kvq_set_pass(ctypes.byref(forward)),
        lambda: loaded.kvq_encode(-1, 6, x.ctypes.data, 1, 16, None, 1, x.ctypes.data, x.ctypes.data),
    ):
        with pytest.raises(BackendError, match=r"no kernels for; use KVQ_BACKEND=numpy") as error:
            library.check(refused())
        assert "\n" not in str(error.value)
    loaded.kvq_set_pass(None)
