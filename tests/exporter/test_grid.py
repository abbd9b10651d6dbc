"""Matrices of 4 bits that take 8 and are rotated stay on the grid of their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.composition import open_bundle
from kvq.exporter.export import Summary, export
from kvq.exporter.rotation import hadamard, rotate_inputs
from kvq.exporter.weights.quantize import quantize_matrix
from kvq.runtime.bundle.bundle import Bundle
from tests.exporter.test_minima import BACKENDS, IDS, PREFILL, Pair, of_parts, through_the_cache
from tests.tools.references import effective_model, in_transformers, logits_of, reference_model

BLOCK = 32
NORMAL_HALVES = st.floats(2**-14, 8, width=16)


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=NORMAL_HALVES,
    low=st.floats(-16, 0, width=16),
    extreme=st.booleans(),
)
def test_rotated_codes_of_four_bits_are_what_they_were_but_for_their_mean(seed, scale, low, extreme):
    random = np.random.default_rng(seed)
    codes = random.choice([0, 15], (5, 3, BLOCK)) if extreme else random.integers(0, 16, (5, 3, BLOCK))
    scales = np.float32(scale) * random.choice([1, 0.5, 2], (5, 3)).astype(np.float32)
    weights = codes.astype(np.float32) * scales[..., None] + (scales * np.float32(low))[..., None]
    rotated = rotate_inputs(weights.reshape(5, -1), hadamard(BLOCK))
    steps = scales / np.sqrt(np.float32(BLOCK))
    found, plain = quantize_matrix(rotated, 8, BLOCK, steps), quantize_matrix(rotated, 8, BLOCK)

    def off(matrix) -> np.ndarray:
        back = rotate_inputs(matrix.dequantize(), hadamard(BLOCK)).reshape(weights.shape)
        return np.abs(back - weights)

    size = np.abs(weights).max()
    fit = np.abs(rotated.reshape(weights.shape) / steps[..., None]).max(-1) <= 127
    lost, usual = (np.square(off(matrix)).sum(-1) for matrix in (found, plain))
    assert (lost <= usual * 1.01 + 1e-6 * size**2).all()
    assert (lost <= (steps / 2) ** 2 * 1.001 + 1e-9 * size**2)[fit].all()  # half a step of their mean alone


@given(seed=st.integers(0, 2**32 - 1))
def test_steps_of_nothing_change_nothing(seed):
    matrix = np.random.default_rng(seed).standard_normal((3, 2 * BLOCK)).astype(np.float32)
    plain, found = (quantize_matrix(matrix, 8, BLOCK, steps) for steps in (None, np.zeros((3, 2), np.float32)))
    assert all(np.array_equal(found.tensors[part], array) for part, array in plain.tensors.items())


KINDS = {
    "Q4_1": of_parts("Q4_1"),
    "Q4_K": of_parts("Q4_K"),
    # One of a stack is enough; what attention yields has 8 bits, rotated inside the weights.
    "mixed": of_parts("Q8_0", attn_v="Q4_K", ffn_down="Q4_1", attn_output="Q5_1"),
}


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied with biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_keeps_grids(kind: str, tied: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, KINDS[kind], tied)
    found = {name: export(pair.file, tmp_path / name, weights=name, center=False) for name in ("auto", "int8")}
    layers = found["auto"].manifest.architecture.layers
    assert found["auto"].manifest.weights["grid"] == 2 * layers, "q k v and down"
    assert found["int8"].manifest.weights["grid"] == 0
    assert [made.manifest.kv["values"] for made in found.values()] == ["half", "folded"]
    blocks = blocks_of(found["auto"])
    assert blocks == [32, 64, 64, 32] * layers
    models = {name: in_transformers(Bundle(made.path), pair.folder) for name, made in found.items()}
    wanted = reference_model(pair.folder).state_dict()
    for part in ("self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.1.{part}.weight"
        off = {of: rms((model.state_dict()[name] - wanted[name]).numpy()) for of, model in models.items()}
        # The minima of these K-quants are drawn, and many of them beyond 8 bits.
        assert off["auto"] < (0.5 if kind == "Q4_1" else 0.8) * off["int8"], part
    logits = {backend: through_the_cache(found["auto"], backend, PREFILL) for backend in BACKENDS}
    assert rms(logits["native"] - logits["numpy"]) <= 0.03 * pair.logits.std()
    twin, again = (
        logits_of(model, IDS).numpy() for model in (effective_model(Bundle(found["auto"].path)), models["auto"])
    )
    assert np.abs(again - twin).max() <= 1e-4
    assert rms(logits["native"] - twin) <= 0.05 * pair.logits.std()


def blocks_of(summary: Summary) -> list[int]:
    """Elements a scale of every product of the layers, in order."""
    nodes = onnx.load(summary.path / summary.manifest.decoder, load_external_data=False).graph.node
    of = [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    return [node["block_size"] for node in of]


@pytest.mark.parametrize(
    "options",
    [{"block": 16}, {"block": 128}, {"rotate": "heads"}, {"rotate": False}, {"weights": "int8"}, {"weights": "int4"}],
    ids=str,
)
def test_what_asks_for_other_blocks_gets_them(options: dict[str, Any], tmp_path: Path) -> None:
    pair = Pair(tmp_path, KINDS["Q4_1"])
    manifest = export(pair.file, tmp_path / "bundle", center=False, **options).manifest
    assert (manifest.weights["grid"], manifest.kv["values"]) == (0, "folded")


@pytest.mark.parametrize("policy", ["int8", "int4", "rule"])
def test_values_that_are_turned_back_inside_the_weights(policy: str, half_bundle: Path) -> None:
    model, logits = open_bundle(half_bundle), {}
    for backend in BACKENDS:
        session = model.session(policy, recent=4, sink=2, prefill_chunk=7, backend=backend)
        first = session.append(IDS[:PREFILL], all_logits=True)
        logits[backend] = np.concatenate([first, *(session.append([token])[None] for token in IDS[PREFILL:])])
    exact = model.session("fp16", recent=64, backend="native").append(IDS, all_logits=True)
    near, far = (rms(logits["native"] - other) for other in (logits["numpy"], exact))
    assert near <= 0.05 * far + 1e-3
    assert 0 < far < (0.05 if policy == "int8" else 0.5) * rms(exact)


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose values are rotated as they come and turned back inside the weights of o; float activations."""
    folder = tmp_path_factory.mktemp("half")
    pair = Pair(folder, of_parts("Q4_1", attn_output="Q5_1"))
    text = "A text to measure keys on. " * 9
    summary = export(pair.file, folder / "bundle", activations="fp32", calibration=text)
    assert summary.manifest.kv == {"rotation": "hadamard", "centered": True, "values": "half", "keys": "balanced"}
    return summary.path
