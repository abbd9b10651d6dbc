"""Rotary embeddings and activations of other families, misused in graphs whose sizes and digests are right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import kvq
from kvq.exporter.export import export
from kvq.runtime.errors import BundleError
from tests.tools.bundles import refusal, relist
from tests.tools.families import SMALL, save_family

FIRST, SECOND = "segment_000.onnx", "segment_001.onnx"
Change = Callable[[onnx.GraphProto], Any]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two rotary embeddings, and a network with GELU."""
    folder = tmp_path_factory.mktemp("angles")
    checkpoint = save_family(folder / "gemma3", SMALL["gemma3"], tokenizer=False)
    return export(checkpoint, folder / "bundle", weights="fp32").path


@pytest.fixture
def bundle(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "bundle"))


def change(bundle: Path, name: str, how: Change) -> None:
    model = onnx.load(bundle / name, load_external_data=False)
    how(model.graph)
    (bundle / name).write_bytes(model.SerializeToString())
    relist(bundle, name)


def node(graph: onnx.GraphProto, kind: str) -> onnx.NodeProto:
    return next(found for found in graph.node if found.op_type == kind)


def without_output(name: str) -> Change:
    def how(graph: onnx.GraphProto) -> None:
        for entries in (graph.output, graph.node):
            kept = [entry for entry in entries if name not in (entry.name, *getattr(entry, "output", ()))]
            del entries[:]
            entries.extend(kept)

    return how


def renamed(old: str, new: str) -> Change:
    """Another name for an input or an output."""

    def how(graph: onnx.GraphProto) -> None:
        for entry in (*graph.input, *graph.output):
            entry.name = new if entry.name == old else entry.name
        for entry in graph.node:
            for names in (entry.input, entry.output):
                names[:] = [new if name == old else name for name in names]

    return how


def third_input(graph: onnx.GraphProto) -> None:
    """A bias, which the operator could have."""
    node(graph, "FastGelu").input.append(node(graph, "FastGelu").input[0])


def test_what_is_changed_here_is_harmless(bundle: Path) -> None:
    for name in (FIRST, SECOND):
        change(bundle, name, lambda graph: None)
    for backend in ("numpy", "native"):
        assert kvq.load(bundle).session(backend=backend).append([1]).shape == (512,)


@pytest.mark.parametrize(
    ("name", "how", "why"),
    [
        (FIRST, renamed("local_sine", "other_sine"), "it yields"),
        (FIRST, renamed("local_sine", "sine"), "it yields|defined twice"),
        (SECOND, renamed("local_cosine", "other_cosine"), "feature set"),
        (SECOND, renamed("local_cosine", "local_sine"), "defined twice|feature set"),
        (SECOND, third_input, "FastGelu .*2 inputs"),
        (SECOND, lambda g: node(g, "FastGelu").attribute.append(helper.make_attribute("alpha", 1.0)), "attributes"),
        (SECOND, lambda g: node(g, "FastGelu").output.append("more"), "FastGelu .*2 outputs"),
    ],
)
def test_a_graph_is_refused(name: str, how: Change, why: str, bundle: Path) -> None:
    change(bundle, name, how)
    with pytest.raises(BundleError, match=why):
        kvq.load(bundle)
    assert refusal(bundle)


@pytest.mark.parametrize("missing", ["local_cosine", "sine"])
def test_angles_that_nothing_yields_are_refused_when_they_are_asked_for(missing: str, bundle: Path) -> None:
    change(bundle, FIRST, without_output(missing))
    with pytest.raises(BundleError, match=r"nothing uses|the manifest says"):
        kvq.load(bundle).session(backend="numpy").append([1])
