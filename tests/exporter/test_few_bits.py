"""Weights in few bits: errors that are made up for, and which matrices are left in 8 bits."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kvq.composition import open_bundle
from kvq.exporter.calibration import calibration_ids, calibration_text
from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.cli import export as command
from kvq.exporter.damage import STEPS, Damage, damages, plan_of_bits
from kvq.exporter.draft import Draft, Moments, draft_of
from kvq.exporter.export import export
from kvq.exporter.graphs.options import GraphOptions
from kvq.exporter.rotation import hadamard, head_rotation
from kvq.exporter.weights.compensate import DAMPING, ROWS, quantize_compensated
from kvq.exporter.weights.quantize import QuantizedMatrix, grid, quantize_matrix, unpacked_zeros
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import CheckpointError
from kvq.runtime.native.library import choose_kernel
from kvq.runtime.native.matrices import multiplies
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.kvdata import examples


def random_moments(rng: np.random.Generator, k: int) -> np.ndarray:
    """Second moments of inputs of different sizes that depend on one another, float64 [k, k]."""
    inputs = rng.standard_normal((2 * k, k)) * rng.uniform(0.1, 3, k)
    inputs += inputs @ rng.standard_normal((k, k)) / k**0.5
    return inputs.T @ inputs


def error(matrix: np.ndarray, quantized: QuantizedMatrix, moments: np.ndarray) -> float:
    """Squared error of the products."""
    lost = (quantized.dequantize() - matrix).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", lost, moments, lost))


def optimal_brain_surgeon(matrix: np.ndarray, bits: int, block: int, moments: np.ndarray) -> np.ndarray:
    """The same as formulas say it, column by column with the inverse of what is left; decoded weights [n, k]."""
    weights, k = matrix.astype(np.float64), matrix.shape[1]
    decoded = np.empty_like(weights)
    damped = moments + np.eye(k) * DAMPING * np.trace(moments) / k
    for column in range(k):
        if column % block == 0:
            padded = np.zeros((len(weights), block), np.float32)
            padded[:, : k - column] = weights[:, column : column + block]
            scales, zeros = (x.astype(np.float64) for x in grid(padded, bits))
        codes = np.clip(np.rint(weights[:, column] / scales + zeros), 0, (1 << bits) - 1)
        decoded[:, column] = (codes - zeros) * scales
        inverse = np.linalg.inv(damped[column:, column:])
        lost = (weights[:, column] - decoded[:, column]) / inverse[0, 0]
        weights[:, column:] -= lost[:, None] * inverse[0]
    return decoded


@given(
    n=st.integers(1, 20),
    k=st.sampled_from([16, 31, 64, 100]),
    block=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from([4, 5, 6, 8]),
    seed=st.integers(0, 2**32 - 1),
)
@examples(15)
def test_errors_are_made_up_for_as_the_formulas_say(n: int, k: int, block: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, moments = rng.standard_normal((n, k)).astype(np.float32), random_moments(rng, k)
    found = quantize_compensated(matrix, bits, block, moments)
    wanted = optimal_brain_surgeon(matrix, bits, block, moments)
    # A weight on the border of two codes may take the other, and the columns behind it with it: seldom.
    rows = np.abs(found.dequantize() - wanted).max(-1) < 1e-3 * np.abs(wanted).max()
    assert rows.mean() >= (0.9 if n > 9 else 0.0)
    assert error(matrix, found, moments) <= 1.02 * float(
        np.einsum("ij,jk,ik->", wanted - matrix, moments, wanted - matrix)
    )


def test_rows_have_nothing_to_do_with_each_other():
    """However many there are at a time, and however many threads work on them."""
    rng = np.random.default_rng(6)
    matrix = rng.normal(size=(2 * ROWS + 5, 96)).astype(np.float32)
    inputs = rng.normal(size=(200, 96)) @ rng.normal(size=(96, 96))
    moments = inputs.T @ inputs
    whole = quantize_compensated(matrix, 4, 32, moments).dequantize()
    for rows in (slice(7), slice(ROWS - 3, ROWS + 9), slice(2 * ROWS - 1, None)):
        # Products of other sizes sum in another order: a weight between two codes, and those behind it, may differ.
        part = quantize_compensated(matrix[rows], 4, 32, moments).dequantize()
        assert (whole[rows] == part).mean() > 0.9


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_products_err_half_as_much_and_without_anything_to_know_nothing_changes(bits: int) -> None:
    rng = np.random.default_rng(1)
    matrix, moments = rng.standard_normal((80, 192)).astype(np.float32), random_moments(rng, 192)
    plain, compensated = quantize_matrix(matrix, bits, 64), quantize_compensated(matrix, bits, 64, moments)
    assert error(matrix, compensated, moments) < 0.6 * error(matrix, plain, moments)
    alone = quantize_compensated(matrix, bits, 64, np.diag(rng.uniform(0.5, 2, 192)))
    for found, wanted in zip(alone, plain, strict=True):
        np.testing.assert_array_equal(found, wanted)


@given(n=st.integers(1, 5), blocks=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
@examples(20)
def test_zero_points_come_back_from_their_packing(n: int, blocks: int, seed: int) -> None:
    zeros = np.random.default_rng(seed).integers(0, 16, (n, blocks), np.uint8)
    codes = np.zeros((n, blocks, 8), np.uint8)
    matrix = QuantizedMatrix(codes, np.ones((n, blocks), np.float32), 4, 16, 16 * blocks, zeros)
    packed = matrix.packed_zeros
    assert packed is not None
    assert packed.shape == (n, -(-blocks // 2))
    np.testing.assert_array_equal(unpacked_zeros(packed, blocks, 4), zeros)


@given(
    found=st.dictionaries(
        st.text("abcdef", min_size=1, max_size=4),
        st.builds(Damage, weights=st.integers(1, 10**6), divergence=st.floats(0, 1)),
        min_size=1,
    ),
    bits=st.floats(4, 8),
)
@examples(100)
def test_a_plan_keeps_to_its_bits_and_takes_the_least_harmful_first(found: dict[str, Damage], bits: float) -> None:
    plan = plan_of_bits(found, bits)
    assert plan.keys() == found.keys()
    weights = sum(damage.weights for damage in found.values())
    assert sum(plan[name] * found[name].weights for name in found) <= bits * weights + 1e-6 * weights

    def price(name: str, many: int, few: int) -> float:
        """What a step down does, for what it saves: of the damage of 4 bits every further one leaves a quarter."""
        return found[name].divergence * (4.0 ** (4 - few) - 4.0 ** (4 - many)) / (found[name].weights * (many - few))

    taken = {(name, many, few) for name in found for many, few in itertools.pairwise(STEPS) if plan[name] <= few}
    left = {(name, many, few) for name in found for many, few in itertools.pairwise(STEPS) if plan[name] > few}
    dearest = max((price(*step) for step in taken), default=0)
    assert dearest <= min((price(*step) for step in left), default=float("inf"))
    if taken:  # one step less would not have been enough
        name, many, _ = max((step for step in taken if plan[step[0]] == step[2]), key=lambda step: price(*step))
        assert sum((plan | {name: many})[each] * found[each].weights for each in found) > (bits - 1e-6) * weights


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose last layer hardly matters: the one before yields nearly all of the residual stream."""
    folder = save_checkpoint(tmp_path_factory.mktemp("few bits") / "checkpoint", TINY, seed=3)
    import safetensors.numpy as safetensors

    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * np.float32(100)
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def draft(damaged: Path, tmp_path: Path):
    checkpoint = load_checkpoint(str(damaged))
    shape = checkpoint.architecture
    means = np.zeros((shape.layers, shape.kv_heads, shape.head_dim), np.float32)
    options = GraphOptions("int4", "int8", 64, head_rotation(shape.head_dim)[1], means)
    ids = calibration_ids(str(checkpoint.tokenizer_json()), calibration_text()[:4000])
    with draft_of(checkpoint, options, tmp_path / "bundle", ids) as found:
        yield found
    assert not list(tmp_path.iterdir())


def test_moments_are_those_of_what_the_products_take(draft: Draft, damaged: Path) -> None:
    moments = Moments(draft)
    tensor = load_checkpoint(str(damaged)).tensor
    ids = np.concatenate([state["ids"] for state in draft.states()])
    rows = tensor("model.embed_tokens.weight")[ids]
    normed = (
        rows / np.sqrt(np.square(rows).mean(-1, keepdims=True) + 1e-6) * tensor("model.layers.0.input_layernorm.weight")
    )
    block = min(64, rows.shape[1])
    turned = (normed.reshape(len(ids), -1, block) @ hadamard(block)).reshape(normed.shape)
    first = moments("model.layers.0.self_attn.q_proj+k_proj+v_proj")
    assert np.abs(first - turned.T @ turned).max() < 0.02 * np.abs(first).max()  # the embedding is of 8 bits
    last = moments("model.layers.2.mlp.down_proj")
    assert np.allclose(last, last.T)
    assert np.linalg.eigvalsh(last).min() > -1e-6 * np.trace(last)
    with pytest.raises(KeyError):
        moments("model.layers.0.mlp.down_proj")  # they are gone by


@pytest.mark.slow
def test_matrices_that_hardly_matter_are_found_and_take_fewer_bits(draft: Draft, damaged: Path, tmp_path: Path) -> None:
    found = damages(draft, 64)
    last = {name for name in found if name.startswith("model.layers.2.")}
    assert len(last) == 4
    assert max(found[name].divergence for name in last) < min(found[name].divergence for name in found.keys() - last)
    share = sum(found[name].weights for name in last) / sum(damage.weights for damage in found.values())
    asked = 8 - 3 * share
    bundle = Bundle(export(damaged, tmp_path / "out", weights=asked).path)
    assert bundle.manifest.weights["layers"] == "mixed"
    assert asked - 0.5 < bundle.manifest.weights["bits"] <= asked
    graph = onnx.load(bundle.path / bundle.manifest.decoder, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    plan = plan_of_bits(found, asked)
    assert max(plan[name] for name in last) < min(plan[name] for name in plan.keys() - last)
    for node in graph.node:
        if node.op_type == "MatMulNBits" and (name := node.input[1].removesuffix(".codes")) in plan:
            assert {a.name: a.i for a in node.attribute}["bits"] == (4 if plan[name] == 4 else 8), name
            codes = onnx.numpy_helper.to_array(tensors[node.input[1]], str(bundle.path))
            assert plan[name] == 4 or (1 << plan[name]) - 2 <= codes.max() < 1 << plan[name], name
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("bits", [5, 6])
def test_codes_of_5_and_6_bits_lie_a_byte_each_and_are_packed_when_they_are_loaded(bits: int, tmp_path: Path) -> None:
    fields = TINY | {"hidden_size": 256, "intermediate_size": 500, "num_hidden_layers": 2, "head_dim": 32}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", fields)  # large enough for its numbers to lie in the file
    manifest = export(checkpoint, tmp_path / "out", weights=f"int{bits}", center=False).manifest
    assert manifest.weights | {"layers": f"int{bits}", "bits": bits, "head": "int8"} == manifest.weights
    graph = onnx.load(tmp_path / "out" / manifest.decoder, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    packed = 0
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            codes, scales, zeros = (
                onnx.numpy_helper.to_array(tensors[name], str(tmp_path / "out")) for name in node.input[1:]
            )
            assert max(codes.max(), zeros.max()) < 1 << bits
            np.testing.assert_array_equal(scales, scales.astype(np.float16))
            packed += codes.size - codes.size * bits // 8 + 2 * scales.size
    model = open_bundle(tmp_path / "out")
    fast, plain = (model.session("fp16", backend=backend) for backend in ("native", "numpy"))
    ids = list(range(5, 45))
    wanted = plain.append(ids, all_logits=True)
    off = np.abs(fast.append(ids, all_logits=True) - wanted).max(-1) / wanted.std()
    # A value between two bytes may become the other one, and tokens behind it see it.
    assert off[0] <= 1e-4
    assert off.max() <= 0.2
    saved = manifest.decode_weight_nbytes - model.engine.decode_weight_nbytes
    assert saved == (packed if multiplies(choose_kernel()[1]) else 0)


@pytest.mark.parametrize("bits", [3.9, 8.1, 0, -1, float("nan")])
def test_bits_that_no_plan_reaches_are_refused(bits: float, damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a number from 4 to 8"):
        export(damaged, tmp_path / "out", weights=bits)
    result = CliRunner().invoke(command, [str(damaged), str(tmp_path / "out"), "--weights", str(bits)])
    assert result.exit_code == 2
    assert "no number from 4 to 8" in result.output
    assert not list(tmp_path.iterdir())


def test_what_has_no_errors_or_no_text_is_refused(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no errors to make up for"):
        export(damaged, tmp_path / "out", weights="fp32", compensate=True)
    mute = tmp_path / "mute"
    shutil.copytree(damaged, mute)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink(missing_ok=True)
    for options in ({"weights": "int4", "compensate": True}, {"weights": 6}):
        with pytest.raises(CheckpointError, match="no tokenizer"):
            export(mute, tmp_path / "out", **options)
    summary = export(mute, tmp_path / "out", weights="int4")
    assert any("not made up for" in note for note in summary.notes)
