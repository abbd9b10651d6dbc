"""Keys in a basis of their own: attention stays what it was, and errors of codes weigh alike in all channels."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.exporter.key_basis import DAMPING, balanced, key_basis
from kvq.exporter.key_statistics import KeyStatistics
from kvq.exporter.rotation import hadamard
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.backends.numpy_backend import NumpyAttention
from kvq.runtime.errors import CheckpointError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.packages import needs

IDS = np.random.default_rng(4).integers(0, 500, 120)


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, tmp_path_factory):
    """Fp32 bundles of one checkpoint, with plain and with balanced keys."""
    folder = tmp_path_factory.mktemp("bundles")
    return {keys: export(str(tiny_checkpoint), folder / keys, weights="fp32", keys=keys).path
            for keys in ("plain", "balanced")}  # fmt: skip


def covariance(rng, dim, samples=64):
    x = rng.standard_normal((samples, dim)) * np.exp(rng.uniform(-2, 2, dim))
    return x.T @ x / samples


def damped(s):
    return s / (np.trace(s) / len(s)) + DAMPING * np.eye(len(s))


def traces(matrix, keys, queries):
    """What the basis is to make small: errors of keys' codes times what queries weigh them with."""
    inverse = np.linalg.inv(matrix)
    return np.trace(matrix @ keys @ matrix.T) * np.trace(inverse.T @ queries @ inverse)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 64]))
def test_with_all_axes_errors_of_codes_are_least(seed, dim):
    rng = np.random.default_rng(seed)
    keys, queries = covariance(rng, dim), covariance(rng, dim)
    found = traces(balanced(keys, queries, hadamard(dim), rank=dim).matrices(), damped(keys), damped(queries))
    least = np.sqrt(np.linalg.eigvals(damped(keys) @ damped(queries)).real).sum() ** 2  # of all matrices
    np.testing.assert_allclose(found, least, rtol=1e-4)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 64]))
def test_a_few_axes_do_better_than_scales_and_scales_better_than_a_rotation(seed, dim):
    rng = np.random.default_rng(seed)
    keys, queries = covariance(rng, dim), covariance(rng, dim)
    left = [
        traces(balanced(keys, queries, hadamard(dim), rank=rank).matrices(), damped(keys), damped(queries))
        for rank in (0, 4)
    ]
    rotated = np.trace(damped(keys)) * np.trace(damped(queries))
    assert left[1] <= left[0] * (1 + 1e-6)
    assert left[0] <= rotated * (1 + 1e-6)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 64]))
def test_axes_are_orthonormal_and_signs_even_out_the_channels(seed, dim):
    rng = np.random.default_rng(seed)
    keys, queries, rotation = covariance(rng, dim), covariance(rng, dim), hadamard(dim)
    basis = balanced(keys, queries, rotation)
    np.testing.assert_allclose(basis.axes @ basis.axes.T, np.eye(4), atol=1e-5)
    assert basis.stretch.min() > 0
    assert np.abs(basis.scale).min() > 0

    def unevenness(matrix):
        return np.square(np.diag(rotation @ matrix @ damped(keys) @ matrix.T @ rotation)).sum()

    signs = np.sign(basis.scale)
    without = replace(basis, scale=signs * basis.scale, axes=signs * basis.axes)
    assert unevenness(basis.matrices()) <= unevenness(without.matrices()) * (1 + 1e-5)


def test_a_head_that_nobody_attends_to_keeps_its_keys():
    basis = balanced(np.zeros((8, 8)), np.zeros((8, 8)), np.eye(8))
    np.testing.assert_allclose(basis.matrices(), np.eye(8), atol=1e-6)


def test_statistics_are_those_of_attention_beyond_window_and_sinks():
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((40, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    found, out = KeyStatistics(1, 2, 8), np.zeros((40, 4, 8), np.float32)
    store = KVStore(Geometry(1, 2, 8), recent=0)
    found.attend(query, key, value, store, 0, out)
    expected = np.zeros_like(out)
    NumpyAttention().attend(query, key, value, store, 0, expected)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    keys, queries = np.zeros((2, 2, 8, 8))
    for head in range(4):
        for i in range(40):
            scores = np.exp(key[: i + 1, head // 2] @ query[i, head] / np.sqrt(8))
            for j in range(4, i - 16):
                weight = scores[j] / scores.sum()
                keys[head // 2] += weight * np.outer(key[j, head // 2], key[j, head // 2])
                queries[head // 2] += weight * np.outer(query[i, head], query[i, head])
    np.testing.assert_allclose(found.keys[0], keys, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.queries[0], queries, rtol=1e-4, atol=1e-5)


def test_statistics_of_rotated_keys_give_the_basis_of_unrotated_ones():
    rng = np.random.default_rng(2)
    query, key, value = (rng.standard_normal((60, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    key[..., :2] += [5, -3]
    bases, rotation = [], hadamard(8)
    for turn in (np.eye(8, dtype=np.float32), rotation):
        found = KeyStatistics(1, 2, 8)
        found.count = 59
        found.attend(query @ turn, key @ turn, value, KVStore(Geometry(1, 2, 8), recent=0), 0, np.zeros_like(query))
        basis, mean = key_basis(found, turn)
        # The mean key is of keys as the cache holds them.
        expected = key[1:].mean(0)[None, ..., None, :] @ basis.matrices().swapaxes(-1, -2) @ turn
        np.testing.assert_allclose(mean, expected[..., 0, :], rtol=1e-4, atol=1e-4)
        bases.append(basis)
    np.testing.assert_allclose(np.abs(bases[0].scale), np.abs(bases[1].scale), rtol=1e-3)


@pytest.mark.parametrize("backend", ["native", "numpy"])
@pytest.mark.parametrize("prefill", ["chunked", "stepwise"])
def test_logits_stay_what_they_were(bundles, backend, prefill):
    """At 16 bits only rounding differs, whatever the basis."""
    plain, new = (
        open_bundle(bundles[keys]).session("fp16", backend=backend, prefill=prefill).append(IDS, all_logits=True)
        for keys in ("plain", "balanced")
    )
    np.testing.assert_allclose(new, plain, atol=2e-2)


def test_backends_agree_at_low_precision(bundles):
    found = []
    for backend in ("native", "numpy"):
        session = open_bundle(bundles["balanced"]).session("k4v2", backend=backend, recent=8)
        found.append(session.append(IDS, all_logits=True))
        found[-1] = np.concatenate([found[-1], *(session.append([token])[None] for token in IDS[:20])])
    # A number on the border of two codes may fall to either side: the rows behind it then differ a little.
    np.testing.assert_allclose(found[0], found[1], atol=0.02)
    assert np.mean(np.abs(found[0] - found[1])) < 1e-3


def test_the_twin_holds_the_keys_that_the_cache_holds(bundles):
    torch = needs("torch")
    from kvq.controller.training.parallel import ParallelModel

    twin = ParallelModel.load(Bundle(bundles["balanced"]))
    with torch.inference_mode():
        passed = twin.run(torch.from_numpy(IDS)[None])
    session = open_bundle(bundles["balanced"]).session("fp16", recent=len(IDS), prefill_chunk=len(IDS))
    logits = session.append(IDS, all_logits=True)
    np.testing.assert_allclose(passed.logits[0].numpy(), logits, atol=1e-3)
    window = session.store.window
    keys, _ = window.read(window.slots(0, len(IDS)))
    assert np.abs(keys - passed.keys[0].numpy()).max() <= 1e-3 * np.abs(keys).max()


def test_the_manifest_says_it(bundles):
    said = {keys: json.loads((path / "kvq.json").read_text())["kv"].get("keys") for keys, path in bundles.items()}
    assert said == {"plain": None, "balanced": "balanced"}


def test_balanced_keys_need_a_text_to_be_measured_on(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", TINY, tokenizer=False)
    with pytest.raises(CheckpointError, match="cannot be balanced"):
        export(str(checkpoint), tmp_path / "out", keys="balanced")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="keys is 'sorted'"):
        export(str(checkpoint), tmp_path / "out", keys="sorted")
