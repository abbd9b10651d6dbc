"""Attention through sliding windows over stores of any mixture: both backends against softmax over what is seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry
from tests.native.test_native import KERNELS, every_kernel, native, new_tokens
from tests.tools.kvdata import Tokens, as_read, examples, filled_store, protected, random_tokens, seeds, with_profiles


def attended(seen: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, ...], layer: int, window: int) -> np.ndarray:
    """Softmax over the tokens that each new one sees, one by one: seen keys, values [layers, kv_heads, tokens, d]."""
    query, key, value = new
    tokens, heads, d = query.shape
    before, group = seen[0].shape[2], heads // key.shape[1]
    out = np.empty(query.shape)
    for t in range(tokens):
        first = max(0, before + t - window + 1) if window else 0
        for h in range(heads):
            keys, values = (
                np.concatenate([old[layer, h // group], own[: t + 1, h // group]])[first:]
                for old, own in zip(seen, (key, value), strict=True)
            )
            scores = keys.astype(float) @ query[t, h] / d**0.5
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ values / weights.sum()
    return out


@st.composite
def situations(draw):
    """A store of any mixture whose layers have windows, its tokens, and new ones."""
    windows = draw(st.sampled_from([(0, 1, 9), (33, 0, 33), (7, 7, 7), (130, 0, 16)]))
    geometry = Geometry(3, draw(st.integers(1, 2)), 16, windows)
    if draw(st.booleans()):
        geometry = with_profiles(geometry, draw(seeds))
    widths = draw(st.sampled_from(((4,), (2, 8), (3, 4, 8, 16))))
    cached = random_tokens(draw(seeds), geometry, draw(st.sampled_from((0, 3, 40, 150, 700))), widths)
    recent, bits = draw(st.sampled_from((0, 5, 40))), draw(protected)
    cuts = [at for at in (100, 300, 301) if at < len(cached.bits)]
    store = filled_store(geometry, cached, recent, 0, cuts, protect_bits=bits)
    new = new_tokens(draw(seeds), draw(st.sampled_from((1, 2, 5, 90))), 2 * geometry.kv_heads, geometry)
    return store, cached, new, recent, bits


@every_kernel
@given(situation=situations(), layer=st.integers(0, 2))
@examples(25)
def test_new_tokens_see_their_window(
    kernel: str, situation: tuple[KVStore, Tokens, tuple[np.ndarray, ...], int, int], layer: int
) -> None:
    store, cached, new, recent, bits = situation
    wanted = attended(as_read(cached, recent, 0, bits, store.geometry), new, layer, store.geometry.windows[layer])
    backends = [native(kernel), NumpyAttention()] if kernel == KERNELS[0] else [native(kernel)]
    for backend in backends:
        out = np.full(wanted.shape, np.nan, np.float32)
        backend.attend(*new, store, layer, out)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


@given(situation=situations(), layer=st.integers(0, 2))
@examples(40)
def test_stepwise_sees_what_single_tokens_see(
    situation: tuple[KVStore, Tokens, tuple[np.ndarray, ...], int, int], layer: int
) -> None:
    store, _, (query, key, value), recent, _ = situation
    tokens = min(len(query), recent + 1)
    new = query[:tokens], key[:tokens], value[:tokens]
    outs = [np.full(new[0].shape, np.nan, np.float32) for _ in range(3)]
    for backend, out in zip((native(KERNELS[-1]), NumpyAttention()), outs[:2], strict=True):
        backend.attend_stepwise(*new, store, layer, out)
    geometry = store.geometry
    for t in range(tokens):
        NumpyAttention().attend(*(x[t : t + 1] for x in new), store, layer, outs[2][t : t + 1])
        both = [np.zeros((3, geometry.kv_heads, 1, 16), np.float32) for _ in range(2)]
        for side, x in zip(both, new[1:], strict=True):
            side[layer, :, 0] = x[t]
        store.append(*both, np.array([[4, 4]], np.uint8))
    for out in outs[:2]:
        np.testing.assert_allclose(out, outs[2], rtol=0, atol=1e-4 * np.abs(outs[2]).max())


@pytest.mark.parametrize("length", [129, 300, 700])
def test_a_store_is_trimmed_as_far_as_its_windows_allow(length: int) -> None:
    geometry = Geometry(3, 2, 16, (33, 0, 33))
    store = filled_store(geometry, random_tokens(1, geometry, 700, (4,)), recent=8)
    least = store.least_trim
    assert 128 < least < 700 - 128
    if length < least:
        with pytest.raises(ValueError, match="layers with a window have lost"):
            store.trim(length)
        return
    store.trim(length)
    assert store.length == length
    assert store.values <= geometry.values * length
    store.trim(0)
    assert (store.length, store.values, store.forgotten, store.used_nbytes) == (0, 0, 0, 0)
