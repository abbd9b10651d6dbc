"""Graphs that this exporter does not write, but could: they are understood, and they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import kvq
from kvq.composition import open_bundle
from kvq.exporter.export import export
from tests.tools.bundles import relist
from tests.tools.checkpoints import TINY

Change = Callable[[onnx.ModelProto], Any]


def rewritten(folder: Path, name: str, change: Change) -> None:
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    relist(folder, name)


def before(model: onnx.ModelProto, at: int, constants: dict[str, np.ndarray], *new: onnx.NodeProto) -> None:
    """Put nodes in front of node `at`, which takes the last one's output for its first input."""
    nodes = list(model.graph.node)
    nodes[at].input[0] = new[-1].output[0]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *new, *nodes[at:]])
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))


def logits(folder: Path) -> np.ndarray:
    return kvq.load(folder).session().append([1, 2, 3])


def test_a_product_before_the_head(bundle: Path) -> None:
    plain = logits(bundle)

    def change(model: onnx.ModelProto) -> None:
        turn = np.eye(TINY["hidden_size"], dtype=np.float32)
        before(model, 0, {"turn": turn}, helper.make_node("MatMul", ["residual", "turn"], ["turned"]))

    rewritten(bundle, "head.onnx", change)
    np.testing.assert_allclose(logits(bundle), plain, atol=1e-4)


def test_a_norm_of_heads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some models have it between the projections and the rotary embedding."""
    monkeypatch.setenv("KVQ_BACKEND", "numpy")

    def change(model: onnx.ModelProto) -> None:
        at = next(i for i, node in enumerate(model.graph.node) if node.op_type == "RotaryEmbedding")
        value = model.graph.node[at].input[0]
        constants = {"by_head": np.array([-1, 12, 8]), "gain": np.ones(8, np.float32), "flat": np.array([1, -1, 96])}
        before(
            model, at, constants,
            helper.make_node("Reshape", [value, "by_head"], ["heads"]),
            helper.make_node("SimplifiedLayerNormalization", ["heads", "gain"], ["normed"], axis=-1, epsilon=1e-6,
                             stash_type=1),
            helper.make_node("Reshape", ["normed", "flat"], ["rows"]),
        )  # fmt: skip

    rewritten(bundle, "segment_001.onnx", change)
    assert np.isfinite(logits(bundle)).all()


def test_a_product_added_to_another_value(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream as the third input of a product, instead of a sum after it."""
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    plain = logits(bundle)

    def change(model: onnx.ModelProto) -> None:
        total = next(node for node in model.graph.node if node.op_type == "Add")
        product = next(node for node in model.graph.node if node.output[0] == total.input[1])
        assert (total.input[0], product.op_type) == ("residual", "Gemm")
        product.input.append("residual")
        product.output[0] = total.output[0]
        model.graph.node.remove(total)

    rewritten(bundle, "segment_001.onnx", change)
    np.testing.assert_allclose(logits(bundle), plain, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_zero_points_of_quantized_weights(flat: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The middle of the codes, said instead of left out: the same logits."""
    folder = export(str(tiny_checkpoint), tmp_path / "bundle", weights="int8", block=32).path
    plain = logits(folder)

    def change(model: onnx.ModelProto) -> None:
        for i, node in enumerate([n for n in model.graph.node if n.op_type == "MatMulNBits"]):
            found = {attribute.name: attribute.i for attribute in node.attribute}
            blocks = -(-found["K"] // found["block_size"])
            width = -(-blocks * found["bits"] // 8)
            points = np.full((found["N"], width), 0x88 if found["bits"] == 4 else 0x80, np.uint8)
            points = points.ravel() if flat else points
            model.graph.initializer.append(numpy_helper.from_array(points, f"points_{i}"))
            node.input.append(f"points_{i}")

    for name in ("decoder.onnx", "head.onnx", *(f"segment_{i:03d}.onnx" for i in range(4))):
        rewritten(folder, name, change)
    np.testing.assert_allclose(logits(folder), plain, atol=2e-2)


def test_every_bundle_that_comes_with_kvq_loads() -> None:
    root = Path(kvq.load("kvq-books").path).parent
    for folder in sorted(root.iterdir()):
        model = open_bundle(folder)
        for name in model.bundle.manifest.controllers:
            assert model.policy(name).name == name
