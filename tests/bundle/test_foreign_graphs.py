"""Graphs whose size and digest are right, so that only the look into them can object."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kvq
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS
from kvq.runtime.errors import BundleError
from tests.tools.bundles import SEGMENT, Damage, edit, refusal, relist
from tests.tools.checkpoints import TINY


def rewritten(change: Callable[[onnx.ModelProto], Any]) -> Damage:
    def damage(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        change(model)
        file.write_bytes(model.SerializeToString())

    return damage


def raw(data: bytes) -> Damage:
    return lambda file: file.write_bytes(data)


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("NonZero", ["residual"], ["indices"]))


def foreign_domain(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["residual", "residual"], ["sum"], domain="evil.custom"))


def body() -> onnx.GraphProto:
    return helper.make_graph([], "body", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])


def branch(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("If", ["c"], ["x"], then_branch=body(), else_branch=body()))


def loop(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Loop", ["n", "c"], ["x"], body=body()))


def subgraph_in_an_allowed_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("body", body()))


def subgraphs_in_an_allowed_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("bodies", [body()]))


def function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("evil", "Add", ["x"], ["y"], [node], [helper.make_opsetid("", 21)]))


def external(location: str) -> Callable[[onnx.ModelProto], None]:
    """Point the first external tensor somewhere else."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = location

    return change


def second_location(model: onnx.ModelProto) -> None:
    """A harmless location first, and another behind it."""
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="t", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


def keyless_external_data(model: onnx.ModelProto) -> None:
    """An entry that is empty on the wire: protobuf reads key and value as empty texts."""
    next(t for t in model.graph.initializer if t.external_data).external_data.add()


def sparse_initializer(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def offset_beyond_the_file(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = str(1 << 40)


def negative_offset(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = "-4096"


def no_output(model: onnx.ModelProto) -> None:
    """A graph of allowed operators that lacks what the runtime binds."""
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("residual_out", TensorProto.FLOAT, None))


def message(field: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, encoded = len(content), b""
    while size > 127:
        size, encoded = size >> 7, encoded + bytes([size & 127 | 128])
    return bytes([field << 3 | 2]) + encoded + bytes([size]) + content


# A node whose operator name is sent as the number 2**62 rather than as text.
NUMBER_AS_OPERATOR = message(7, message(1, bytes([4 << 3]) + b"\x80" * 8 + b"\x40"))
GRAPHS: list[tuple[str, Damage, str]] = [
    ("foreign operator", rewritten(foreign_operator), "operator NonZero"),
    ("foreign domain", rewritten(foreign_domain), "operator evil.custom::Add"),
    ("If", rewritten(branch), "subgraph"),
    ("Loop", rewritten(loop), "subgraph"),
    ("subgraph in Add", rewritten(subgraph_in_an_allowed_operator), "subgraph"),
    ("subgraphs in Add", rewritten(subgraphs_in_an_allowed_operator), "subgraphs"),
    ("function", rewritten(function), "functions"),
    ("data from ../secret", rewritten(external("../secret")), "external data from '../secret'"),
    ("data from an absolute path", rewritten(external("/etc/passwd")), "external data from '/etc/passwd'"),
    ("data from the manifest", rewritten(external(MANIFEST)), "external data from 'kvq.json'"),
    ("data from memory", rewritten(external("*/_ORT_MEM_ADDR_/*")), "external data from"),  # onnxruntime's own marker
    ("data by a detour", rewritten(external(f"./{WEIGHTS}")), "external data from"),
    ("data from a second location", rewritten(second_location), "external data from '/etc/passwd'"),
    ("data in an attribute", rewritten(external_in_an_attribute), "external data from '/etc/passwd'"),
    ("data without a key", rewritten(keyless_external_data), SEGMENT),
    ("data beyond the file", rewritten(offset_beyond_the_file), SEGMENT),
    ("data before the file", rewritten(negative_offset), SEGMENT),
    ("sparse initializer", rewritten(sparse_initializer), "sparse initializers"),
    ("no query_key", rewritten(no_output), SEGMENT),
    ("number for an operator", raw(NUMBER_AS_OPERATOR), SEGMENT),
    ("random bytes", raw(np.random.default_rng(0).bytes(4096)), "not a readable ONNX file"),
    ("text", raw(b"<html>404 Not Found</html>"), "not a readable ONNX file"),
    ("zeros", raw(bytes(64)), SEGMENT),
    ("nothing", raw(b""), SEGMENT),
]

# The backend that runs a graph, and the graph.
every_form = pytest.mark.parametrize(("backend", "graph"), [("numpy", SEGMENT), ("native", "decoder.onnx")])


@every_form
@pytest.mark.parametrize(("damage", "words"), [pytest.param(*row[1:], id=row[0]) for row in GRAPHS])
def test_foreign_graph_is_refused(monkeypatch, backend, graph, damage: Damage, words: str, bundle: Path) -> None:
    monkeypatch.setenv("KVQ_BACKEND", backend)
    damage(bundle / graph)
    relist(bundle, graph)
    Bundle(bundle)  # nothing about the file itself is wrong
    message = refusal(bundle)
    assert graph in message
    assert words.replace(SEGMENT, graph) in message


def test_a_foreign_graph_is_refused_even_where_another_form_would_run(monkeypatch, bundle: Path) -> None:
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    rewritten(foreign_operator)(bundle / "decoder.onnx")
    relist(bundle, "decoder.onnx")
    assert "operator NonZero" in refusal(bundle)


def test_swapped_segments_are_refused(monkeypatch, bundle: Path) -> None:
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    edit(bundle, lambda data: data["segments"].reverse())
    refusal(bundle)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden", 128), ("heads", 4), ("kv_heads", 8), ("head_dim", 16), ("vocab", 1024), ("vocab", 256)],
)
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_shape_other_than_that_of_the_graphs_is_refused(
    monkeypatch, backend: str, name: str, value: int, bundle: Path
) -> None:
    monkeypatch.setenv("KVQ_BACKEND", backend)
    edit(bundle, lambda data: data["architecture"].update({name: value}))
    refusal(bundle)


def test_the_rewriting_itself_is_harmless(bundle: Path) -> None:
    rewritten(lambda model: None)(bundle / SEGMENT)
    relist(bundle, SEGMENT)
    assert kvq.load(bundle).session().append([1]).shape == (TINY["vocab_size"],)


def test_every_cut_of_a_graph_is_a_bundle_error_or_passes_the_guard(tiny_bundle: Path) -> None:
    data = (tiny_bundle / SEGMENT).read_bytes()
    refused = 0
    for length in range(0, len(data), 7):
        try:
            check_graph(data[:length], SEGMENT, {WEIGHTS})
        except BundleError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(data), 7))


@pytest.mark.slow
def test_no_byte_of_a_graph_makes_the_guard_fail_otherwise(tiny_bundle: Path) -> None:
    data = (tiny_bundle / SEGMENT).read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(data), 1500):
        damaged = bytearray(data)
        damaged[at] = rng.integers(256)
        with contextlib.suppress(BundleError):  # anything else fails the test
            check_graph(bytes(damaged), SEGMENT, {WEIGHTS})
