"""The native backend against the numpy one: attention, encoding, whole models, threads."""

from __future__ import annotations

import os
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.compute.backends import make_backend
from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.errors import BackendError, NonFiniteError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.native import library
from kvq.runtime.native.codecs import native_codecs
from kvq.runtime.native.library import CHUNK_SLOTS
from kvq.runtime.precision.codecs import NUMPY
from kvq.runtime.precision.table import Geometry
from tests.tools.kvdata import (
    WIDTHS,
    arrays_in,
    examples,
    fill,
    filled_store,
    protected,
    random_feedback,
    random_tokens,
    random_turns,
    seeds,
    with_profiles,
)

# Of the largest output; both sides are single precision. Where scores are taken by integer dot products queries are
# rounded to 16 bits, and weights of values, which adds a noise of 1.6e-5 of the root mean square.
TOLERANCE, ROUNDED_TOLERANCE = 3e-5, dict.fromkeys(("avx512", "amx", "avxvnni", "avx2", "dotprod"), 1.2e-4)
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
    return both[:, :heads], both[:, heads:], rng.standard_normal((tokens, *geometry[1:3]), np.float32)


def assert_equals_numpy(backend, store, query, key, value, layer=0):
    results, tolerance = [], ROUNDED_TOLERANCE.get(backend.detail, TOLERANCE)
    for one in (backend, NumpyAttention()):
        out = np.full(query.shape, np.nan, np.float32)
        squares = np.full(query.shape[:2], np.nan, np.float32)
        one.attend(query, key, value, store, layer, out, squares)
        results.append((out, squares))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@st.composite
def situations(draw):
    """A store of any mixture and new tokens for it."""
    geometry = Geometry(2, draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_DIMS)))
    if draw(st.booleans()):
        geometry = with_profiles(geometry, draw(seeds))
    widths = draw(st.sampled_from((*((w,) for w in WIDTHS), (2, 4), WIDTHS)))
    cached = random_tokens(draw(seeds), geometry, draw(st.sampled_from(COUNTS)), widths)
    recent, sink = draw(st.sampled_from((0, 5, 16, 37))), draw(st.sampled_from((0, 4)))
    store = filled_store(geometry, cached, recent, sink, protect_bits=draw(protected))
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


CODECS = {**NUMPY.by_id, **{f"window{bits}": codec for bits, codec in NUMPY.windows.items()}}


def both_codecs(kernel, name):
    codecs = native_codecs(library.kernels()[kernel])
    return codecs.windows[int(name[6:])] if isinstance(name, str) else codecs.by_id[name], CODECS[name]


def assert_encodes_as_numpy(kernel, name, x, feedback=None):
    results, refusals = [], []
    for codec in both_codecs(kernel, name):
        try:
            results.append(codec.encode(x, feedback))
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
    share=st.sampled_from((None, None, 0.0, 0.3)),
)
@examples(80)
def test_native_encoding_gives_numpy_s_bytes(kernel, name, seed, shape, exponents, steps, share):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(min(exponents), max(exponents), (*shape[:-1], 1))
    if steps:  # ties in rounding, and zeros
        x = rng.integers(-8, 9, shape) / steps
    feedback = None
    if share is not None and shape[-1] < 1024:  # of errors; a matrix for each row of vectors
        drawn = rng.uniform(-share, share, (shape[0], shape[-1], shape[-1]))
        feedback = drawn.astype(np.float16)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        assert_encodes_as_numpy(kernel, name, x.astype(np.float32), feedback)


@every_kernel
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "value",
    [np.nan, np.inf, -np.inf, 65504, 65519, 65520, -65536, 8.3e6, 65024, 65030, 8.4e6, 3.4e38, 0, -0.0, 6e-8, 1e-40],
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


@pytest.mark.slow
@every_kernel
@given(
    steps=moves,
    recent=st.sampled_from((0, 1, 5, 16, 37)),
    sink=st.sampled_from((0, 3)),
    bits=protected,
    seed=seeds,
    fed_back=st.booleans(),
    turned=st.booleans(),
    share=st.sampled_from((0, 0.5)),
)
@examples(40)
def test_a_native_store_holds_numpy_s_bytes_at_every_step(
    kernel, steps, recent, sink, bits, seed, fed_back, turned, share
):
    geometry = with_profiles(Geometry(4 if share else 2, 2, 24), seed, share)
    feedback = random_feedback(seed, geometry) if fed_back else None
    turns = random_turns(seed, geometry) if turned else None
    codecs = [each._replace(feedback=feedback, turns=turns) for each in (native(kernel).codecs, NUMPY)]
    stores = [KVStore(geometry, recent, sink, each, bits) for each in codecs]
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
    codecs = NUMPY._replace(feedback=session.store.codecs.feedback, turns=session.store.codecs.turns)
    store = KVStore(session.store.geometry, recent=16, sink=4, codecs=codecs, protect_bits=8)
    append, choose = session.store.append, session.store.choose_open
    chosen = {}
    store.choose_open = lambda of, start, count: chosen[start, count]

    def append_to_both(keys, values, bits):
        append(keys, values, bits)
        store.append(keys.copy(), values.copy(), bits)

    def choose_for_both(of, start, count):
        chosen[start, count] = choose(of, start, count)
        store.settle()
        return chosen[start, count]

    session.store.append, session.store.choose_open = append_to_both, choose_for_both
    run(session)
    assert session.store.account() == store.account()
    session.store.settle()
    del session.store.append
    for found, expected in zip(stored_arrays(session.store), stored_arrays(store), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
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
