"""Controllers of a bundle that do harm, or that are not what the manifest says, asked for as a policy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import kvq
from kvq.composition import open_bundle
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import BundleError, PolicyError
from tests.attacks.conftest import Attack, little_memory, refused
from tests.attacks.graphs import attribute, before, content, front, model, node, nodes, replace
from tests.tools.bundles import edit

FILE, PAPER = "controller.onnx", "controller-paper.onnx"


def put(**fields: Any) -> Attack:
    return lambda folder: edit(folder, lambda data: data["controllers"]["adaptive"].update(fields))


def far_away(found: Any) -> None:
    """Data outside of the controller's own file."""
    tensor = next(t for t in found.graph.initializer if t.name == "weight_0")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "1024")):
        tensor.external_data.add(key=key, value=value)


def weights_of(value: float) -> Callable[[Any], None]:
    """A first layer of one number."""

    def change(found: Any) -> None:
        tensor = next(t for t in found.graph.initializer if t.name == "weight_0")
        array = np.full_like(numpy_helper.to_array(tensor), value)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


ATTACKS: dict[str, tuple[Attack, str]] = {
    "no graph": (content(FILE, lambda data: b"x" * 64), "controller.onnx is not a readable ONNX file"),
    "another graph": (put(file="head.onnx"), "head.onnx is refused"),
    "the other controller": (put(file=PAPER), "controller-paper.onnx is refused: .*scores is declared"),
    "a loop": (model(FILE, lambda m: front(m, node("Loop", "ids", "x"))), "operator Loop is not one"),
    "a sequence": (model(FILE, before("Relu", node("SequenceEmpty", ""))), "operator SequenceEmpty is not one"),
    "the native library": (
        model(
            FILE,
            lambda m: (
                m.opset_import.append(helper.make_opsetid("kvq", 1)),
                before("Relu", node("SwiGLU", "VALUE", domain="kvq"))(m),
            ),
        ),
        "it is of the decoder alone",
    ),
    "data in the weights": (model(FILE, far_away), "external data from 'weights.bin'"),
    "padded to 8 GB": (
        model(FILE, before("Relu", node("Pad", "VALUE n"), n=np.array([0, 0, 0, 1 << 31]))),
        "larger than any value",
    ),
    "whole numbers calculated with": (
        model(FILE, before("Cast", node("Div", "VALUE n"), n=np.array([0]))),
        "operator Div .*not float32",
    ),
    "sums over tokens": (
        model(
            FILE,
            lambda m: (
                m.graph.initializer.append(numpy_helper.from_array(np.array([2]), "two")),
                replace(m, nodes(m, "ReduceSumSquare")[0], 1, "two"),
            ),
        ),
        "it cuts or joins tokens",
    ),
    "choices over tokens": (model(PAPER, attribute("LogSoftmax", "axis", 0)), "it cuts or joins tokens"),
    "no scores": (model(FILE, lambda m: m.graph.ClearField("output")), "it yields"),
    "scores of fewer classes": (
        lambda f: edit(f, lambda d: d["controllers"]["adaptive"]["classes"].pop()),
        "scores is declared as",
    ),
    "scores for no class": (put(classes=[]), "damaged in the manifest"),
    "classes of one number": (put(classes=[[2]] * 6), "damaged in the manifest"),
    "classes of two lengths": (put(classes=[[2, 2], [2]]), "damaged in the manifest"),
    "one class": (put(classes=[[2, 2]] * 6), "damaged in the manifest"),
    "a class twice": (put(classes=[[2, 2], [3, 2], [3, 2], [5, 5], [8, 8], [16, 16]]), "damaged in the manifest"),
    "scores that are no numbers": (model(FILE, weights_of(np.nan)), "scores that are no numbers"),
    "scores without end, less themselves": (model(FILE, weights_of(np.inf)), "scores that are no numbers"),
    "a codec that is not there": (
        put(classes=[[2, 2], [2, 2], [2, 2], [2, 2], [2, 2], [7, 7]]),
        "damaged in the manifest",
    ),
    "no curve": (put(curve={}), "damaged in the manifest"),
    "half a curve": (put(curve={"bytes": [1.0], "mu": []}), "damaged in the manifest"),
    "a curve that falls": (put(curve={"bytes": [2.0, 1.0], "mu": [0.0, 1.0]}), "damaged in the manifest"),
    "a curve of nothing": (put(curve={"bytes": [], "mu": []}), "damaged in the manifest"),
    "of another model": (put(model="0" * 64), "trained for another model"),
    "of no model": (put(model=""), "trained for another model"),
    "inputs that are another's": (
        model(FILE, lambda m: setattr(next(i for i in m.graph.input if i.name == "residual"), "name", "mood")),
        "feature set this kvq does not know",
    ),
}


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A copy of the embedded model, which has controllers."""
    return Path(shutil.copytree(kvq.load("kvq-books").path, tmp_path / "bundle"))


@pytest.mark.parametrize("name", ATTACKS)
def test_controller_is_refused(name: str, books: Path) -> None:
    attack, words = ATTACKS[name]
    attack(books)
    asked = "paper" if name == "choices over tokens" else "adaptive"
    refused(books, words, lambda loaded: loaded.session(asked))


def test_a_controller_that_has_gone_is_missed_by_name(books: Path) -> None:
    loaded = open_bundle(books)
    (books / FILE).unlink()
    with pytest.raises(BundleError, match=r"controller\.onnx is gone"):
        loaded.session("adaptive")


def test_a_controller_that_has_changed_is_refused(books: Path) -> None:
    loaded = open_bundle(books)
    (books / FILE).write_bytes((books / PAPER).read_bytes())
    with pytest.raises(BundleError, match=r"controller\.onnx has changed since"):
        loaded.session("adaptive")


def test_a_graph_that_has_changed_since_the_bundle_was_opened_is_refused(books: Path) -> None:
    bundle = Bundle(books)
    (books / "head.onnx").write_bytes((books / "uncertainty.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"head\.onnx has changed since"):
        bundle.graph("decoder.onnx")


def test_a_controller_that_fails_while_it_runs_is_a_policy_s_error(
    books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = open_bundle(books).policy("adaptive")
    monkeypatch.setattr(policy, "_session", None)
    with pytest.raises(PolicyError, match=r"controller 'adaptive' does not fit this model .*; train one with"):
        policy._check(np.zeros(1, np.int64), 384, (6, 2, 1, 64))


def test_little_memory_is_little() -> None:
    """What the attacks are tried under does what it says."""
    with little_memory(), pytest.raises(MemoryError):
        np.ones(1 << 30, np.uint8)
