"""The turning mean of keys: found again in keys that have one, left out where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from kvq.exporter.key_statistics import KeyStatistics
from kvq.exporter.key_turns import Turned, frequencies_of, turned_keys, turned_means, turning
from kvq.exporter.rotation import head_rotation
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.key_turns import MOST_REACH, middle, parsed
from kvq.runtime.precision.table import Geometry

D, HALF, TEXT = 16, 8, 512
FREQUENCIES = 1000.0 ** -(np.arange(HALF) / HALF)


def turned(x, places):
    """Vectors [n, D] behind a rotary embedding, the halves of a vector paired."""
    angles = places[:, None] * FREQUENCIES
    first, second = x[:, :HALF], x[:, HALF:]
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], 1)


def measured(mean, spread=0.3, layers=1, frequencies=FREQUENCIES, seed=0):
    """Statistics of keys about `mean` [D], turned, in every layer; and the keys as the cache has them, [TEXT, D]."""
    rng, rotation = np.random.default_rng(seed), head_rotation(D, True)[1]
    statistics = KeyStatistics(layers, 1, D, np.tile(frequencies, (layers, 1)))
    store = KVStore(Geometry(layers, 1, D), recent=0)
    keys = turned(mean + spread * rng.standard_normal((TEXT, D)), np.arange(TEXT)) @ rotation
    query = 0.1 * rng.standard_normal((TEXT, 2, D))
    new = [np.ascontiguousarray(x, np.float32) for x in (query, keys[:, None], query[:, :1])]
    for layer in range(layers):
        statistics.attend(*new, store, layer, np.empty((TEXT, 2, D), np.float32))
    statistics.count = TEXT - 1
    return statistics, keys, rotation


def test_a_mean_before_the_embedding_is_found():
    mean = np.random.default_rng(1).normal(0, 1, D)
    statistics, _, rotation = measured(mean)
    found, _ = turned_means(statistics, rotation)
    assert np.isin(found.frequencies[0], FREQUENCIES.astype(np.float32)).all()
    vectors = found.vectors[0, 0] @ rotation.T  # [pairs, 2, D], unrotated
    for w, (u, v) in zip(found.frequencies[0], vectors, strict=True):
        pair = int(np.abs(FREQUENCIES - w).argmin())
        shrunk = np.sinc(w * 8 / np.pi)  # what is left of it in the mean of a block
        np.testing.assert_allclose(u[[pair, pair + HALF]], shrunk * mean[[pair, pair + HALF]], atol=0.15)
        np.testing.assert_allclose(v[[pair, pair + HALF]], shrunk * mean[[pair + HALF, pair]] * [-1, 1], atol=0.15)
        assert np.count_nonzero(np.abs(u) > 1e-9) <= 2


def test_statistics_without_it_are_those_of_the_keys_that_are_left():
    statistics, keys, rotation = measured(np.random.default_rng(2).normal(0, 1, D))
    found, less = turned_means(statistics, rotation)
    factors = found.frequencies[0].astype(np.float64)[:, None] * middle(np.arange(TEXT) // 16)
    waves = np.stack([np.cos(factors), np.sin(factors)], 1)
    left = keys - np.einsum("jsn,jsd->nd", waves, found.vectors[0, 0])
    np.testing.assert_allclose(less.plain[0, 0], left[1:].sum(0), atol=0.05)
    assert np.trace(less.keys[0, 0]) < 0.5 * np.trace(statistics.keys[0, 0])
    assert np.linalg.eigvalsh(less.keys[0, 0])[0] > -1e-6 * np.trace(less.keys[0, 0])


def test_turned_keys_lie_nearer_to_their_mean_in_the_new_basis():
    statistics, keys, rotation = measured(np.random.default_rng(3).normal(0, 1, D))
    basis, mean, found = turned_keys(statistics, rotation)
    turns = parsed(found.data, 1, 1, D)
    change = rotation.T @ basis.matrices()[0, 0] @ rotation
    stored = keys @ change.T - mean[0, 0]
    left = stored - turns.of(np.arange(TEXT))[0, 0]
    assert np.square(left).mean() < 0.7 * np.square(stored - stored.mean(0)).mean()
    assert np.abs(left.mean(0)).max() < 0.1


@pytest.mark.parametrize("why", ["no embedding", "no mean"])
def test_what_does_not_turn_is_left_out(why):
    if why == "no embedding":
        statistics, _, rotation = measured(np.ones(D), frequencies=np.zeros(HALF))
        _, _, found = turned_keys(statistics, rotation)
        assert found.data is None
        return
    assert turning(np.array([0.0]))[0] == 0
    assert turning(np.array([1e-6]))[0] < 1e-5
    assert turning(np.array([0.05]))[0] > 0.99


def test_layers_whose_keys_would_be_moved_too_far_are_left_as_they_are():
    mean = np.random.default_rng(4).normal(0, 1, D)
    statistics, _, rotation = measured(mean, layers=2)
    far = 1e6
    for part in (statistics.keys, statistics.wave_keys, statistics.key_sums, statistics.plain):
        part[1] *= far
    statistics.keys[1] *= far
    statistics.queries[1] *= far**2  # so that the basis does not shrink them
    _, _, found = turned_keys(statistics, rotation)
    assert not found.vectors[1].any()
    turns = parsed(found.data, 2, 1, D)
    assert turns.which.tolist() == [0, -1]
    assert turns.reach <= MOST_REACH


def test_frequencies_are_those_of_each_layer_s_embedding():
    class Embedding:
        inv_freq = np.arange(4, dtype=np.float32)

    class Layer:
        def __init__(self, rotary):
            self.attend = type("Attend", (), {"rotary": rotary})

    shape = type("Shape", (), {"layers": 2, "head_dim": 8})
    model = type("Model", (), {"shape": shape, "layers": [Layer(None), Layer(0)], "rotaries": (Embedding,)})
    np.testing.assert_array_equal(frequencies_of(model), [np.zeros(4), np.arange(4)])
    assert Turned(np.zeros((1, 0), np.float32), np.zeros((1, 1, 0, 2, 8))).data is None
