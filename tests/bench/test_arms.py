"""Arms and what they run: the same numbers in every format, checked before anything is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvq
from kvq.bench.arm import arms
from kvq.bench.check import check_ids, relative_difference
from kvq.bench.floor import read_bandwidth
from kvq.bench.kvq.controllers import add_controllers
from kvq.bench.shapes import assets
from kvq.bench.weights import BundleWeights
from kvq.runtime.bundle.manifest import MANIFEST
from tests.tools.packages import needs


@pytest.mark.slow
def test_controllers_of_the_benchmark_are_added_once_and_mix_classes(measured, cache):
    bundle = assets("tiny", cache).bundle
    before = (bundle / MANIFEST).read_bytes()
    add_controllers(bundle, 1)
    assert (bundle / MANIFEST).read_bytes() == before
    model = kvq.load(bundle)
    ids = np.random.default_rng(4).integers(0, 512, 600)
    for name in ("adaptive", "paper"):
        session = model.session(name, kv_bits=4.5)
        session.append(ids)
        held = [row["tokens"] for pair, row in session.stats().precisions.items() if pair != "recent"]
        assert sum(tokens > 30 for tokens in held) >= 2


@pytest.mark.slow
def test_checkpoint_holds_the_values_of_the_bundle(cache):
    from safetensors.numpy import load_file

    made = assets("tiny", cache)
    stored = load_file(made.checkpoint / "model.safetensors")
    weights = BundleWeights(made)
    expected = weights.vectors() | {name: matrix.dequantize() for name, matrix in weights.parts()}
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor)


@pytest.mark.slow
def test_gguf_blocks_decode_to_the_values_of_the_bundle(cache):
    gguf = needs("gguf")
    from kvq.bench.peers.llama import gguf_blocks

    for _, matrix in BundleWeights(assets("tiny", cache)).parts():
        kind, blocks = gguf_blocks(matrix)
        decoded = gguf.quants.dequantize(blocks, kind)
        np.testing.assert_allclose(decoded, matrix.dequantize(), rtol=2**-10, atol=1e-7)  # scales in half precision


@pytest.mark.slow
def test_arms_with_4_bits_run_the_numbers_of_the_bundle(tmp_path):
    gguf = needs("gguf")
    from kvq.bench.peers.llama import gguf_blocks

    command = [sys.executable, "-m", "kvq.bench.decode", "--shape", "tiny-int4", "--context", "24", "--rounds", "1"]
    command += ["--steps", "2", "--prefills", "1", "--arms", "kvq-fp16,ort-gqa-fp32", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # an arm that computes something else is one
    made = assets("tiny-int4", tmp_path)
    assert made.manifest.weights["layers"] == "int4"
    for name, matrix in BundleWeights(made).parts():
        assert (matrix.bits == 4) == ("embed" not in name), name
        exact, (kind, blocks) = matrix.dequantize(), gguf_blocks(matrix)
        off = gguf.quants.dequantize(blocks, kind) - exact
        assert np.square(off).mean() < 0.02 * np.square(exact).mean(), name  # Q4_0 is no finer


def test_relative_difference():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9, 4096)).astype(np.float32)
    assert relative_difference(a, a) == 0
    assert relative_difference(a, a + 5) == pytest.approx(5, rel=0.05)
    assert relative_difference(a, b) == pytest.approx(2**0.5, rel=0.05)
    assert relative_difference(a[:1], b) == float("inf")
    assert relative_difference(np.full_like(a, np.nan), a) == float("inf")


def test_check_tokens_are_the_same_every_time():
    for first, second in zip(check_ids(512), check_ids(512), strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.max() < 512


def test_bandwidth_is_bytes_per_second():
    assert 1e8 < read_bandwidth(1, nbytes=1 << 24, repeats=2) < 1e13


def test_every_arm_has_a_name_for_its_family():
    assert {name.split("-")[0] for name in arms()} >= {"kvq", "ort", "transformers", "llama", "genai", "openvino"}
    assert next(iter(arms())).startswith("kvq-")


def test_nothing_of_the_benchmark_imports_torch_or_a_peer_at_start():
    code = "import sys, kvq.bench.decode; print(sorted({'torch', 'onnx', 'llama_cpp', 'openvino'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr
