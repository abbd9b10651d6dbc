"""Profiles that an export finds: what is measured is what a cache does, and the choice is the best one there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.exporter.key_statistics import RECENT, SINK
from kvq.exporter.profile_probe import APART, TOKENS, _Reader, probe
from kvq.exporter.profiles import LEAST_GAIN, assignment, choose, profiles_for
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import Head
from kvq.runtime.compute.passes import SegmentedPass
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import CODECS, NUMPY
from kvq.runtime.precision.table import Geometry, Pair
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.kvdata import examples, seeds

IDS = np.random.default_rng(4).integers(0, 500, 140)
WIDE = {**TINY, "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
PRECISIONS = [2, 3, 5, 8]
SIZES = {id_: CODECS[id_].vector_bytes(32) for id_ in PRECISIONS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", WIDE | {"num_hidden_layers": 4}, seed=3)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    """Quantized weights with activations in bytes, as most bundles have them; without profiles."""
    folder = tmp_path_factory.mktemp("bundle") / "wide"
    return Bundle(export(str(checkpoint), folder, weights="int8", block=32, profiles=False).path)


@given(seed=seeds, items=st.integers(1, 5), extra=st.integers(0, 160))
@examples(60)
def test_an_assignment_is_the_best_of_all(seed, items, extra):
    rng = np.random.default_rng(seed)
    damages = [dict(zip(PRECISIONS, sorted(rng.exponential(1, 4), reverse=True), strict=True)) for _ in range(items)]
    room = items * min(SIZES.values()) + extra
    found = assignment(damages, SIZES, room)
    assert sum(SIZES[id_] for id_ in found) <= room

    def total(chosen):
        return sum(damage[id_] for damage, id_ in zip(damages, chosen, strict=True))

    every = itertools.product(PRECISIONS, repeat=items)
    assert total(found) == pytest.approx(min(total(c) for c in every if sum(SIZES[i] for i in c) <= room))


@given(seed=seeds, layers=st.integers(2, 8))
@examples(60)
def test_profiles_take_no_more_bytes_than_their_class_and_gain(seed, layers):
    rng = np.random.default_rng(seed)
    each = {2: 1.0, 3: 0.25, 5: 0.06, 8: 0.0003}
    damages = [tuple({k: v * w for k, v in each.items()} for w in rng.lognormal(0, 1, 2)) for _ in range(layers)]
    profiles = choose(damages, SIZES)
    geometry = Geometry(layers, 2, 32, profiles=profiles)
    plain = geometry._replace(profiles=())
    for pair, by_layer in profiles:
        assert geometry.token_bytes(pair) <= plain.token_bytes(pair)
        ours, theirs = (
            sum(damages[layer][side][own[side]] for layer, own in enumerate(by) for side in (0, 1))
            for by in (by_layer, [pair] * layers)
        )
        assert ours < (1 - LEAST_GAIN) * theirs
    assert not {Pair(8, 8), Pair(16, 16), Pair(2, 2)} & {pair for pair, _ in profiles}


def test_layers_that_are_alike_have_no_profiles():
    each = {2: 1.0, 3: 0.25, 5: 0.06, 8: 0.0003}
    assert Pair(5, 5) not in dict(choose([(each, each)] * 4, SIZES))


def test_attention_is_read_as_a_store_keeps_it():
    shape = Geometry(1, 2, 32)
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((60, heads, 32), np.float32) for heads in (4, 2, 2))
    state = {"query_key": np.concatenate([query, key], 1), "value": value}

    class Shape:
        heads, kv_heads, head_dim, windows = 4, 2, 32, ()

    reader = _Reader(Shape, 60)
    keys, values = reader.changed(0, state, NUMPY, [3])
    for pair, found in (((3, 16), keys[3]), ((16, 3), values[3]), (None, reader.attention(0, state))):
        store = KVStore(shape, RECENT, SINK)
        for t in range(60):
            out = np.empty((1, 4, 32), np.float32)
            NumpyAttention().attend(query[t : t + 1], key[t : t + 1], value[t : t + 1], store, 0, out)
            np.testing.assert_allclose(found[t], out[0], atol=3e-3)
            new = [np.ascontiguousarray(x[t : t + 1].transpose(1, 0, 2)[None]) for x in (key, value)]
            store.append(*new, np.array([pair or (16, 16)], np.uint8))


def _log_probabilities(model, attend):
    layers = SegmentedPass(Engine(model), len(IDS), attend)
    layers.forward(IDS, KVStore(model.manifest.architecture.geometry, recent=0))
    logits = Head(layers.engine, len(IDS)).logits(layers.residual).copy().astype(np.float64)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def test_what_is_measured_is_what_the_runtime_does(checkpoint, tmp_path):
    """Layer by layer, with weights and activations in float32: passes whose attention reads one side in few bits."""
    folder = export(str(checkpoint), tmp_path / "exact", weights="fp32", activations="fp32", profiles=False).path
    model = Bundle(folder)
    shape = model.manifest.architecture
    codecs = NUMPY._replace(feedback=model.key_feedback, turns=model.key_turns)
    reader, found = _Reader(shape, len(IDS)), probe(model, IDS, PRECISIONS)

    def attend_with(layer, side):
        def attend(query, key, value, store, at, out, row_squares=None):
            state = {"query_key": np.concatenate([query, key], 1), "value": value}
            changed = reader.changed(at, state, codecs, [3])[side][3] if at == layer else reader.attention(at, state)
            out[...] = changed

        return attend

    exact = _log_probabilities(model, attend_with(None, 0))[::APART]
    assert len(IDS) <= TOKENS
    for layer in range(shape.layers):
        for side in (0, 1):
            other = _log_probabilities(model, attend_with(layer, side))[::APART]
            expected = (np.exp(exact) * (exact - other)).sum(-1).mean()
            assert found[layer][side][3] == pytest.approx(expected, rel=0.02, abs=1e-6)
            assert found[layer][side][2] > found[layer][side][3] > found[layer][side][5] > found[layer][side][8]


def test_activations_in_bytes_do_not_blur_what_is_measured(bundle):
    damages = probe(bundle, IDS, PRECISIONS)
    assert all(0 < d[8] < 0.02 * d[3] for layer in damages for d in layer)


def test_an_export_writes_profiles_and_the_model_runs_by_them(checkpoint, tmp_path):
    done = export(str(checkpoint), tmp_path / "bundle", weights="int8", block=32, profiles=True)
    again = export(str(checkpoint), tmp_path / "again", weights="int8", block=32, profiles=True)
    profiles = done.manifest.architecture.profiles
    assert profiles == again.manifest.architecture.profiles
    assert profiles
    assert f"precisions by layer: {profiles[0][0]}" in "\n".join(done.lines())
    model = open_bundle(done.path)
    assert model.architecture.profiles == profiles
    logits = {}
    for backend in ("numpy", "native"):
        session = model.session("int3", backend=backend)
        session.append(IDS)
        logits[backend] = session.last_logits
    assert np.abs(logits["numpy"] - logits["native"]).max() < 0.2


def test_few_channels_and_short_texts_get_none(bundle, tiny_bundle, checkpoint, tmp_path):
    assert profiles_for(Bundle(tiny_bundle), IDS) == ()  # 8 channels: 3 bits take the words of 8
    assert profiles_for(bundle, IDS[:60]) == ()
    plain = export(str(checkpoint), tmp_path / "plain", weights="fp32", center=False, profiles=True)
    assert plain.manifest.architecture.profiles == ()
