"""Changes of ONNX files for attacks: on the wire, and on what the onnx package makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.tools.bundles import relist
from tests.tools.mutants import Fields, fields_of, serialized

Model = onnx.ModelProto
Attack = Callable[[Path], Any]
GRAPH, NODE, INITIALIZER = 7, 1, 5  # fields of a model and of a graph
SEGMENT, HEAD, DECODER, UNCERTAINTY = "segment_001.onnx", "head.onnx", "decoder.onnx", "uncertainty.onnx"
FIRST = "segment_000.onnx"
NORM, NBITS, GEMM, ROTARY = "SimplifiedLayerNormalization", "MatMulNBits", "Gemm", "RotaryEmbedding"
ONE, FLOATS = np.array([1], np.int64), TensorProto.FLOAT


def wire(graph: str, change: Callable[[Fields], Any]) -> Attack:
    """Change the fields of the file as they are written."""

    def attack(folder: Path) -> None:
        tree = fields_of((folder / graph).read_bytes())
        change(tree)
        (folder / graph).write_bytes(serialized(tree))
        relist(folder, graph)

    return attack


def content(graph: str, change: Callable[[bytes], bytes]) -> Attack:
    """Change the bytes of the file."""

    def attack(folder: Path) -> None:
        (folder / graph).write_bytes(change((folder / graph).read_bytes()))
        relist(folder, graph)

    return attack


def model(graph: str, change: Callable[[Model], Any]) -> Attack:
    """Change what the onnx package reads."""

    def attack(folder: Path) -> None:
        found = onnx.load(folder / graph, load_external_data=False)
        change(found)
        (folder / graph).write_bytes(found.SerializeToString())
        relist(folder, graph)

    return attack


def inner(fields: Fields, *numbers: int) -> Fields:
    """The first message below, by field numbers."""
    for number in numbers:
        fields = next(content for found, _, content in fields if found == number)
    return fields


def nodes(found: Model, kind: str) -> list[onnx.NodeProto]:
    return [node for node in found.graph.node if node.op_type == kind]


def attribute(kind: str, name: str, value: Any, at: int = 0) -> Callable[[Model], None]:
    """Set an attribute of a node of that kind; None takes it away."""

    def change(found: Model) -> None:
        node = nodes(found, kind)[at]
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])

    return change


def numbers(kind: str, at: int, values: Any) -> Callable[[Model], None]:
    """Give a node of that kind a new constant of whole numbers as input `at`."""

    def change(found: Model) -> None:
        array = np.asarray(values, np.int64)
        found.graph.initializer.append(numpy_helper.from_array(array, "evil_numbers"))
        replace(found, nodes(found, kind)[0], at, "evil_numbers")

    return change


def replace(found: Model, node: onnx.NodeProto, at: int, name: str) -> None:
    """Another input for a node; a constant that nothing uses then goes."""
    old = node.input[at]
    node.input[at] = name
    drop_unused(found, old)


def drop_unused(found: Model, name: str) -> None:
    if not any(name in node.input for node in found.graph.node):
        kept = [tensor for tensor in found.graph.initializer if tensor.name != name]
        del found.graph.initializer[:]
        found.graph.initializer.extend(kept)


def front(found: Model, *new: onnx.NodeProto) -> None:
    """Put nodes in front of the others."""
    kept = list(found.graph.node)
    del found.graph.node[:]
    found.graph.node.extend([*new, *kept])


def before(kind: str, *new: onnx.NodeProto, result: str = "evil", **constants: Any) -> Callable[[Model], None]:
    """Put nodes in front of the first node of a kind, which takes `result` for its first input, which they take as
    VALUE; constants by name."""

    def change(found: Model) -> None:
        node = nodes(found, kind)[0]
        value, node.input[0] = node.input[0], result
        for name, array in constants.items():
            found.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        for made in new:
            for i, name in enumerate(made.input):
                made.input[i] = value if name == "VALUE" else name
        kept = list(found.graph.node)
        at = kept.index(node)
        del found.graph.node[:]
        found.graph.node.extend([*kept[:at], *new, *kept[at:]])

    return change


def node(kind: str, inputs: str, output: str = "evil", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node; inputs are separated by spaces."""
    return helper.make_node(kind, inputs.split(), output.split(), domain=domain, **attributes)


def external(key: str, value: str | None, more: tuple[str, str] | None = None, at: int = 0) -> Callable[[Model], None]:
    """Set an entry of the external data of a constant; None takes it away, `more` is one more."""

    def change(found: Model) -> None:
        tensor = [t for t in found.graph.initializer if t.external_data][at]
        kept = [entry for entry in tensor.external_data if entry.key != key or value is not None]
        for entry in kept:
            if entry.key == key:
                entry.value = value
        kept = [(entry.key, entry.value) for entry in kept]
        del tensor.external_data[:]
        for name, text in [*kept, *([more] if more else [])]:
            tensor.external_data.add(key=name, value=text)

    return change


def constant(change: Callable[[TensorProto], Any], kind: int | None = None) -> Callable[[Model], None]:
    """Change the first constant inside the graph, of a data type if wanted."""

    def attack(found: Model) -> None:
        inside = [t for t in found.graph.initializer if not t.external_data and kind in (None, t.data_type)]
        change(inside[0])

    return attack
