"""Keys less a mean that turns with the position: the definition, what a store does with it, and its file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import CODECS, NUMPY
from kvq.runtime.precision.codecs.uniform import WINDOWS
from kvq.runtime.precision.key_turns import KeyTurns, most_bytes, packed, parsed
from kvq.runtime.precision.table import Geometry
from tests.tools.kvdata import examples, fill, random_tokens, random_turns, seeds

GEOMETRY = Geometry(3, 2, 24)
PAIRS = 5


def drawn(seed):
    rng = np.random.default_rng(seed)
    frequencies = np.exp(-rng.uniform(0, 8, (3, PAIRS))).astype(np.float32)
    return frequencies, rng.normal(0, 1, (3, 2, PAIRS, 2, 24)).astype(np.float32)


def slowly(frequencies, vectors, position):
    """The module's definition for one position, float64 [layers, kv_heads, head_dim]."""
    middle = position // 16 * 16 + 7.5
    angles = frequencies.astype(np.float64) * middle
    return sum(
        np.cos(angles[:, j, None, None]) * vectors[:, :, j, 0] + np.sin(angles[:, j, None, None]) * vectors[:, :, j, 1]
        for j in range(frequencies.shape[1])
    )


@given(seed=seeds, positions=st.lists(st.integers(0, 40_000), max_size=6))
@examples(30)
def test_it_is_the_sum_of_its_waves(seed, positions):
    frequencies, vectors = drawn(seed)
    turns = KeyTurns(frequencies, vectors)
    found = turns.of(np.array(positions, np.int64))
    assert found.shape == (3, 2, len(positions), 24)
    for n, position in enumerate(positions):
        expected = slowly(frequencies, vectors, position)
        np.testing.assert_allclose(found[:, :, n], expected, atol=2e-5)
        assert np.abs(expected).max() <= turns.reach * (1 + 1e-6)
    for layer in range(3):
        np.testing.assert_array_equal(turns.of(np.array(positions, np.int64), layer), found[layer])
        np.testing.assert_allclose(turns.seen(np.array(positions, np.int64), layer), found[layer], atol=2e-5)


def test_what_is_stored_does_not_depend_on_how_long_the_text_became():
    frequencies, vectors = drawn(1)
    short, long = KeyTurns(frequencies, vectors), KeyTurns(frequencies, vectors)
    long.waves(100_000)
    for block in (0, 63, 64, 200):
        np.testing.assert_array_equal(short.at(block), long.at(block))
    assert short.waves(5)[:, :, :64].tobytes() == long.waves(5)[:, :, :64].tobytes()


def test_layers_without_vectors_are_left_as_they_are():
    frequencies, vectors = drawn(2)
    vectors[1] = 0
    frequencies[2] = frequencies[0]
    turns = KeyTurns(frequencies, vectors)
    assert turns.which.tolist() == [0, -1, 0]
    assert not turns.of(np.arange(40), 1).any()
    assert not turns.seen(np.arange(40), 1).any()
    still = KeyTurns(frequencies, np.zeros_like(vectors))
    assert still.which.tolist() == [-1, -1, -1]
    assert not still.at(3).any()
    assert still.reach == 0


@pytest.mark.parametrize("recent", [0, 16])
@pytest.mark.parametrize("width", [2, 3, 5, 8, 16])
def test_readers_see_what_is_stored_and_what_was_taken_off(recent, width):
    turns, tokens = random_turns(7, GEOMETRY), random_tokens(5, GEOMETRY, 90, (width,))
    store = fill(KVStore(GEOMETRY, recent, codecs=NUMPY._replace(turns=turns)), tokens, (7, 30, 31))
    turned = turns.of(np.arange(90)) if CODECS[width].bits <= 4 else 0
    kept = WINDOWS[16].roundtrip(tokens.keys) if recent else tokens.keys
    expected = CODECS[width].roundtrip(kept - turned) + turned
    expected[:, :, 90 - recent :] = kept[:, :, 90 - recent :]
    for layer in range(GEOMETRY.layers):
        for keys, values, places in store.placed_blocks(layer, 16):
            np.testing.assert_allclose(keys, expected[layer][:, places], atol=2e-5)
            assert values.shape == keys.shape


def test_keys_that_turn_are_stored_better():
    turns, tokens = random_turns(7, GEOMETRY), random_tokens(5, GEOMETRY, 200, (3,))
    keys = 0.3 * tokens.keys + turns.of(np.arange(200))
    layer = int(np.flatnonzero(turns.which >= 0)[0])
    errors = []
    for codecs in (NUMPY, NUMPY._replace(turns=turns)):
        store = KVStore(GEOMETRY, 0, codecs=codecs)
        store.append(keys, tokens.values, tokens.bits)
        ((seen, _),) = store.blocks(layer, 1024)
        errors.append(np.square(seen - keys[layer]).mean())
    assert errors[1] < 0.1 * errors[0]


def test_a_file_holds_it():
    frequencies, vectors = drawn(3)
    data = packed(frequencies, vectors)
    assert len(data) <= most_bytes(3, 2, 24)
    found = parsed(data, 3, 2, 24)
    np.testing.assert_allclose(found.vectors[:, :, : 2 * PAIRS].reshape(vectors.shape), vectors, atol=2e-3)
    assert packed(frequencies, vectors) == packed(frequencies, vectors.astype(np.float16))


@pytest.mark.parametrize("change", ["short", "long", "empty", "pairs", "nan", "infinity", "far", "fast"])
def test_files_of_anything_else_are_refused(change):
    frequencies, vectors = drawn(4)
    if change == "pairs":
        frequencies, vectors = np.tile(frequencies, (1, 3))[:, :13], np.tile(vectors, (1, 1, 3, 1, 1))[:, :, :13]
    if change in ("nan", "infinity"):
        vectors[1, 0, 2, 1, 3] = np.nan if change == "nan" else np.inf
    if change == "far":
        vectors[:, :, :, 0] = 30_000
    if change == "fast":
        frequencies[0, 1] = 5
    data = packed(frequencies, vectors)
    data = {"short": data[:-2], "long": data + bytes(2), "empty": b""}.get(change, data)
    with pytest.raises(ValueError, match=r"bytes|number|far"):
        parsed(data, 3, 2, 24)
