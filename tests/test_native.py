"""The native backend against the numpy one: attention, encoding, whole models, threads, and what it refuses."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.attention import make_backend
from kvq.runtime.attention.numpy_backend import NumpyAttention
from kvq.runtime.codecs import NUMPY
from kvq.runtime.errors import BackendError, NonFiniteError
from kvq.runtime.native import library
from kvq.runtime.native.codecs import native_codecs
from kvq.runtime.native.library import CHUNK_SLOTS
from kvq.runtime.pages import Geometry
from kvq.runtime.store import KVStore
from kvq.runtime.threads import session_options
from tests.kvdata import WIDTHS, arrays_in, examples, fill, filled_store, random_tokens, seeds

# Of the largest output; both sides are single precision.
TOLERANCE = 3e-5
HEAD_DIMS = (8, 16, 24, 40, 64, 80, 96, 128, 256)
COUNTS = (0, 1, 7, 15, 16, 17, 63, 64, 65, 130)

try:
    KERNELS = list(library.kernels())
except BackendError:
    if os.environ.get("KVQ_CI") == "1":
        raise
    pytest.skip("the native library was not built: install kvq where a C compiler is", allow_module_level=True)

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def native(kernel):
    """A native backend for an instruction set."""
    with mock.patch.dict(os.environ, KVQ_NATIVE_ISA=kernel):
        backend = make_backend("native")
    assert (backend.name, backend.detail) == ("native", kernel)
    return backend


def new_tokens(seed, tokens, heads, geometry):
    """Query, key, value float32 of new tokens, views into larger arrays."""
    rng = np.random.default_rng(seed)
    both = rng.standard_normal((tokens, heads + geometry.kv_heads, geometry.head_dim), np.float32)
    return both[:, :heads], both[:, heads:], rng.standard_normal((tokens, *geometry[1:]), np.float32)


def assert_equals_numpy(backend, store, query, key, value, layer=0):
    results = []
    for one in (backend, NumpyAttention()):
        out = np.full(query.shape, np.nan, np.float32)
        squares = np.full(query.shape[:2], np.nan, np.float32)
        one.attend(query, key, value, store, layer, out, squares)
        results.append((out, squares))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@st.composite
def situations(draw):
    """A store of any mixture and new tokens for it."""
    geometry = Geometry(2, draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_DIMS)))
    widths = draw(st.sampled_from((*((w,) for w in WIDTHS), (2, 4), WIDTHS)))
    cached = random_tokens(draw(seeds), geometry, draw(st.sampled_from(COUNTS)), widths)
    store = filled_store(geometry, cached, draw(st.sampled_from((0, 5, 16, 37))), draw(st.sampled_from((0, 4))))
    heads = geometry.kv_heads * draw(st.integers(1, 8))
    return store, *new_tokens(draw(seeds), draw(st.sampled_from((1, 1, 2, 5, 17))), heads, geometry)


@every_kernel
@given(situation=situations(), layer=st.integers(0, 1))
@examples(60)
def test_any_mixture_equals_numpy(kernel, situation, layer):
    assert_equals_numpy(native(kernel), *situation, layer)


@every_kernel
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_group_of_heads_equals_numpy(kernel, head_dim):
    geometry = Geometry(1, 2, head_dim)
    store = filled_store(geometry, random_tokens(head_dim, geometry, 150), recent=16)
    for group in range(1, 9):
        for tokens in (1, 3):
            assert_equals_numpy(native(kernel), store, *new_tokens(group, tokens, 2 * group, geometry))


@pytest.fixture(scope="module", params=[0, 5, 16, 37, 1500])
def long_store(request):
    """1023 tokens of every precision, or all of them in a window that is not full."""
    geometry = Geometry(1, 2, 64)
    return filled_store(geometry, random_tokens(1, geometry, 1023), recent=request.param)


@every_kernel
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_long_store_equals_numpy(kernel, long_store, tokens):
    assert_equals_numpy(native(kernel), long_store, *new_tokens(2, tokens, 6, long_store.geometry))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 60)),
        st.tuples(st.just("trim"), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=8,
)


@every_kernel
@given(steps=steps, recent=st.sampled_from((0, 5, 16, 37)), seed=seeds)
@examples(40)
def test_appending_and_trimming_keep_the_page_table_right(kernel, steps, recent, seed):
    geometry = Geometry(1, 2, 16)
    backend, store = native(kernel), KVStore(geometry, recent)
    for i, (step, amount) in enumerate([("append", 20), *steps]):
        if step == "append":
            fill(store, random_tokens(seed + i, geometry, amount, (2, 8)))
        else:
            store.trim(int(amount * store.length))
        assert_equals_numpy(backend, store, *new_tokens(seed + i, 1 + i % 2, 4, geometry))


@every_kernel
def test_a_window_longer_than_a_row_of_the_table_equals_numpy(kernel):
    geometry = Geometry(1, 1, 16)
    backend, store = native(kernel), KVStore(geometry, CHUNK_SLOTS + 476)
    # Part of the first row, into the second, full, going round, and cut back to a ring with a gap.
    for i, (append, trim) in enumerate([(700, 0), (500, 0), (300, 0), (333, 0), (0, 1), (0, 900), (40, 0), (1400, 0)]):
        fill(store, random_tokens(i, geometry, append, (4,)))
        store.trim(store.length - min(trim, store.length))
        for tokens in (1, 2):
            assert_equals_numpy(backend, store, *new_tokens(i, tokens, 3, geometry))


CODECS = {**NUMPY.by_bits, "window": NUMPY.window}


def both_codecs(kernel, name):
    codecs = native_codecs(library.kernels()[kernel])
    return codecs.window if name == "window" else codecs.by_bits[name], CODECS[name]


def assert_encodes_as_numpy(kernel, name, x):
    results, refusals = [], []
    for codec in both_codecs(kernel, name):
        try:
            results.append(codec.encode(x))
        except NonFiniteError as error:
            refusals.append(str(error))
    assert len(refusals) in (0, 2), refusals
    assert len(set(refusals)) <= 1, refusals
    for found, wanted in zip(*results, strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(found, wanted)


@every_kernel
@pytest.mark.parametrize("name", CODECS)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 2), st.integers(0, 4), st.sampled_from((*HEAD_DIMS, 1024, 1032))),
    exponents=st.tuples(st.integers(-45, 38), st.integers(-45, 38)),
    steps=st.sampled_from((0, 0, 2, 4)),
)
@examples(80)
def test_native_encoding_gives_numpy_s_bytes(kernel, name, seed, shape, exponents, steps):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(min(exponents), max(exponents), (*shape[:-1], 1))
    if steps:  # ties in rounding, and zeros
        x = rng.integers(-8, 9, shape) / steps
    with np.errstate(over="ignore", under="ignore"):
        assert_encodes_as_numpy(kernel, name, x.astype(np.float32))


@every_kernel
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 65504, 65519, 65520, -65536, 8.3e6, 8.4e6, 3.4e38, 0, -0.0, 6e-8, 1e-40]
)
def test_extreme_values_are_encoded_or_refused_as_numpy_does(kernel, name, value):
    x = np.linspace(-1, 1, 3 * 24, dtype=np.float32).reshape(3, 24)
    if abs(value) < 1:
        x *= np.float32(abs(value))
    x[1, 7] = value
    assert_encodes_as_numpy(kernel, name, x)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from((1, 1, 1, 2, 30))),
        st.tuples(st.just("refused"), st.sampled_from((np.nan, np.inf, 65520))),
        st.tuples(st.just("trim"), st.floats(0.5, 1)),
    ),
    min_size=1,
    max_size=40,
)


@every_kernel
@given(steps=moves, recent=st.sampled_from((0, 1, 5, 16, 37)), sink=st.sampled_from((0, 3)), seed=seeds)
@examples(40)
def test_a_native_store_holds_numpy_s_bytes_at_every_step(kernel, steps, recent, sink, seed):
    geometry = Geometry(2, 2, 24)
    stores = [KVStore(geometry, recent, sink, codecs) for codecs in (native(kernel).codecs, NUMPY)]
    for i, (step, amount) in enumerate([("append", 20), *steps]):
        for store in stores:
            if step == "append":
                fill(store, random_tokens(seed + i, geometry, amount))
            elif step == "trim":
                store.trim(int(amount * store.length))
            else:
                tokens = random_tokens(seed + i, geometry, 1)
                tokens.values[1, 1, 0, 23] = amount
                # Without a window, whether 65520 is refused depends on the bits.
                tokens.bits[:] = 16
                with pytest.raises(NonFiniteError):
                    store.append(*tokens)
        ours, numpy_s = stores
        assert ours.account() == numpy_s.account()
        assert (ours.length, ours.window.count, ours.nbytes) == (numpy_s.length, numpy_s.window.count, numpy_s.nbytes)
        for found, expected in zip(stored_arrays(ours), stored_arrays(numpy_s), strict=True):
            np.testing.assert_array_equal(found, expected)


def stored_arrays(store):
    """All arrays of window and buckets, in an order of their own."""
    buckets = [bucket for _, bucket in sorted(store.buckets.items())]
    return [array for part in (store.window, *buckets) for array in arrays_in(part)]


@every_kernel
@pytest.mark.parametrize("name", CODECS)
def test_views_are_encoded_as_numpy_does(kernel, name):
    x = np.random.default_rng(3).standard_normal((2, 9, 3, 48)).astype(np.float32)
    assert_encodes_as_numpy(kernel, name, x.swapaxes(1, 2)[:, :, ::2, 8:32])


# Whole models. A number on the border between two codes may fall to either side, after which logits
# (here of standard deviation 2) differ by what that code is worth: measured up to 0.001 at 8 bits, 0.015 below.
IDS = np.random.default_rng(0).integers(1, 512, 130).tolist()
LOGITS = {"fp16": 1e-3, "int8": 0.01, "int4": 0.05, "int2": 0.05, "mixed": 0.05, "k8v4": 0.05, "rule": 0.1}


def run(session, ids=IDS, prefill=100):
    """Logits of every token, float32 [tokens, vocab]: a prefill in chunks, the rest token by token."""
    logits = [session.append(ids[:prefill], all_logits=True)]
    logits += [session.append([token])[None] for token in ids[prefill:]]
    return np.concatenate(logits)


@pytest.mark.parametrize("policy", LOGITS)
def test_a_model_gives_numpy_s_logits(tiny_model, policy):
    options = {"policy": policy, "recent": 16, "prefill_chunk": 32}
    found, expected = (run(tiny_model.session(**options, backend=backend)) for backend in ("native", "numpy"))
    assert np.abs(found - expected).max() < LOGITS[policy]


@every_kernel
def test_a_model_gives_numpy_s_logits_with_every_instruction_set(tiny_model, monkeypatch, kernel):
    monkeypatch.setenv("KVQ_NATIVE_ISA", kernel)
    options = {"policy": "fp16", "recent": 256, "prefill_chunk": 48}
    found, expected = (run(tiny_model.session(**options, backend=backend)) for backend in ("native", "numpy"))
    assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("policy", ["int2", "mixed", "rule"])
def test_a_native_session_stores_what_numpy_would_have_stored(tiny_model, policy):
    session = tiny_model.session(policy=policy, recent=16, sink=4, prefill_chunk=32, backend="native")
    store = KVStore(session.store.geometry, recent=16, sink=4, codecs=NUMPY)
    append, decide = session.store.append, session.store.decide

    def append_to_both(keys, values, bits):
        store.append(keys.copy(), values.copy(), bits)
        append(keys, values, bits)

    def decide_in_both(bits):
        store.decide(bits)
        decide(bits)

    session.store.append, session.store.decide = append_to_both, decide_in_both
    run(session)
    assert session.store.account() == store.account()
    del session.store.append, session.store.decide
    for found, expected in zip(stored_arrays(session.store), stored_arrays(store), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_sessions_in_several_threads_give_the_logits_they_give_alone(tiny_model):
    rng = np.random.default_rng(5)
    options = [
        {"policy": policy, "recent": recent, "prefill_chunk": chunk, "backend": "native"}
        for policy, recent, chunk in (("fp16", 16, 128), ("mixed", 0, 7), ("int2", 5, 32), ("rule", 37, 1))
    ]
    texts = [rng.integers(1, 512, 40 + 20 * i).tolist() for i in range(len(options))]

    def go(i):
        return run(tiny_model.session(**options[i]), texts[i], prefill=20)

    alone = [go(i) for i in range(len(options))]
    wrong = []

    def hammer(i):
        try:
            for _ in range(6):
                if not np.array_equal(go(i), alone[i]):
                    wrong.append(f"session {i} has other logits")
        except Exception as error:
            wrong.append(f"session {i}: {error}")

    threads = [threading.Thread(target=hammer, args=(i % len(options),)) for i in range(2 * len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The decoder graph names no memory: it works on the pass that its own thread has set, and on no other.


@pytest.fixture
def native_pass(tiny_model):
    """A pass of two tokens beside a session that holds some."""
    session = tiny_model.session(backend="native")
    session.append(IDS[:20])
    return session, session.backend.forward_pass(tiny_model.engine, 2)


def assert_still_works(session, forward):
    forward.forward(np.array(IDS[20:22]), session.store)
    assert np.isfinite(forward.residual).all()


def test_the_decoder_does_not_run_without_a_pass(native_pass):
    session, forward = native_pass
    with pytest.raises(Exception, match="no session has set a pass"):
        forward._graph.run()
    assert_still_works(session, forward)
    with pytest.raises(Exception, match="no session has set a pass"):  # and the last pass was taken away
        forward._graph.run()


def test_a_pass_is_not_seen_by_another_thread(native_pass):
    session, forward = native_pass
    said = []

    def other():
        try:
            forward._graph.run()
        except Exception as error:
            said.append(str(error))

    library.load().kvq_set_pass(ctypes.byref(forward._pass))
    try:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    finally:
        library.load().kvq_set_pass(None)
    assert len(said) == 1
    assert "no session has set a pass" in said[0]
    assert_still_works(session, forward)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", 1, "shape"),
        ("tokens", 3, "shape"),
        ("heads", 16, "shape"),
        ("kv_heads", 2, "shape"),
        ("head_dim", 16, "shape"),
        ("layers", 1, "layer"),
        ("layers", 0, "layer"),
    ],
)
def test_a_graph_that_does_not_fit_the_pass_is_refused(native_pass, field, value, message):
    session, forward = native_pass
    true = getattr(forward._pass, field)
    setattr(forward._pass, field, value)
    with pytest.raises(Exception, match=message):
        forward.forward(np.array(IDS[20:22]), session.store)
    setattr(forward._pass, field, true)
    assert_still_works(session, forward)


def foreign_graph(layer, columns):
    """A session of one attention node whose first input has that many columns."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ["qkv", "cosine", "sine", "mean_key"]
    node = helper.make_node("Attention", names, ["out"], domain="kvq", layer=layer, rotate=1)
    inputs = [helper.make_tensor_value_info(name, kind, None) for name in names]
    graph = helper.make_graph([node], "foreign", inputs, [helper.make_tensor_value_info("out", kind, None)])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("kvq", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = session_options()
    options.register_custom_ops_library(str(library.FILE))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (-1, {}),
        (3, {}),
        (2**40, {}),
        (0, {"qkv": (2, 8)}),
        (0, {"qkv": (0, 128)}),
        (0, {"qkv": (2, 16, 8)}),
        (0, {"qkv": ()}),
        (0, {"cosine": (2, 3)}),
        (0, {"sine": (1, 4)}),
        (0, {"mean_key": (8, 4)}),
        (0, {"mean_key": (32,)}),
    ],
)
def test_a_foreign_graph_with_wrong_shapes_reads_nothing(tiny_model, native_pass, layer, shapes):
    session, forward = native_pass
    shape = tiny_model.architecture
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    half = shape.head_dim // 2
    fitting = {"qkv": (2, wide), "cosine": (2, half), "sine": (2, half), "mean_key": (shape.kv_heads, shape.head_dim)}
    feed = {name: np.ones(size, np.float32) for name, size in (fitting | shapes).items()}
    graph = foreign_graph(layer, wide)
    with pytest.raises(Exception, match="kvq"):
        graph.run(None, feed)  # no pass at all
    library.load().kvq_set_pass(ctypes.byref(forward._pass))
    try:
        with pytest.raises(Exception, match="kvq"):
            graph.run(None, feed)
    finally:
        library.load().kvq_set_pass(None)
    assert_still_works(session, forward)


# What a library that is missing, broken or of another version leads to.


@pytest.fixture
def use_library(monkeypatch):
    """Have another file taken for the library."""

    def use(file):
        monkeypatch.setattr(library, "FILE", file)
        library.load.cache_clear()

    monkeypatch.delenv("KVQ_BACKEND", raising=False)
    yield use
    library.load.cache_clear()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_library_says_what_to_do(tiny_model, use_library, monkeypatch, tmp_path):
    use_library(tmp_path / "libkvq.so")
    monkeypatch.setenv("KVQ_BACKEND", "native")
    with pytest.raises(BackendError, match=r"not built: install .* compiler") as error:
        tiny_model.session()
    one_line(error)


def test_auto_falls_back_to_numpy_and_says_why(tiny_model, use_library, tmp_path):
    use_library(tmp_path / "libkvq.so")
    session = tiny_model.session()
    session.append(IDS[:5])
    stats = session.stats()
    assert stats.backend == "numpy"
    assert "no native: the native library was not built" in stats.backend_detail
    assert "no native" in stats.line()


def test_auto_is_native_where_it_can_be(tiny_model, use_library, monkeypatch):
    monkeypatch.delenv("KVQ_NATIVE_ISA", raising=False)
    stats = tiny_model.session().stats()
    assert (stats.backend, stats.backend_detail) == ("native", KERNELS[-1])


def test_an_instruction_set_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setenv("KVQ_NATIVE_ISA", "nonsense")
    with pytest.raises(BackendError, match="KVQ_NATIVE_ISA=nonsense") as error:
        make_backend("native")
    assert all(kernel in one_line(error) for kernel in KERNELS)


def test_a_library_of_another_version_is_refused(use_library, monkeypatch):
    use_library(library.FILE)
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(
        BackendError, match=f"version {library.ABI - 1}, this kvq needs {library.ABI}; install"
    ) as error:
        make_backend("native")
    one_line(error)


def test_a_file_that_is_no_library_is_refused(use_library, tmp_path):
    file = tmp_path / "libkvq.so"
    file.write_bytes(b"\x7fELF and nothing more")
    use_library(file)
    with pytest.raises(BackendError, match="cannot be loaded") as error:
        make_backend("native")
    one_line(error)


def test_a_library_of_somebody_else_is_refused(use_library):
    use_library(Path(_ctypes.__file__))
    with pytest.raises(BackendError, match="cannot be loaded") as error:
        make_backend("native")
    one_line(error)
