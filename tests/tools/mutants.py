"""Graphs that have been changed a little: bytes, fields of the wire format, and nodes that stay well-formed.

Everything here reads and writes protobuf by itself or by the onnx package, apart from the reader that it tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# A field: [number, wire type, content]; the content of a message is a list of fields, any other number or bytes.
Fields = list[list[Any]]
VARINT, FIXED64, DELIMITED, GROUP, GROUP_END, FIXED32 = range(6)


def varint(value: int, least: int = 1) -> bytes:
    """A number of 64 bits, padded to so many bytes."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127 or len(out) + 1 < least:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields_of(data: bytes, descriptor: Any = onnx.ModelProto.DESCRIPTOR) -> Fields:
    """A serialized message as a tree."""
    found, at = [], 0
    while at < len(data):
        tag, at = _number(data, at)
        number, wire = tag >> 3, tag & 7
        content: Any
        if wire == VARINT:
            content, at = _number(data, at)
        elif wire == FIXED32:
            content, at = data[at : at + 4], at + 4
        else:
            size, at = _number(data, at)
            content, at = data[at : at + size], at + size
            inner = descriptor.fields_by_number[number].message_type
            content = fields_of(content, inner) if inner is not None else content
        found.append([number, wire, content])
    return found


def serialized(fields: Fields) -> bytes:
    """The message of a tree. A number of a field may be bytes: the tag as it is to be written."""
    out = []
    for number, wire, content in fields:
        out.append(number if isinstance(number, bytes) else varint(number << 3 | wire))
        if wire == VARINT:
            out.append(content if isinstance(content, bytes) else varint(content))
        elif wire == DELIMITED:
            content = serialized(content) if isinstance(content, list) else content
            out += [varint(len(content)), content]
        else:
            out.append(content)
    return b"".join(out)


def _messages(fields: Fields) -> list[Fields]:
    """All messages of a tree, itself first."""
    found = [fields]
    for _, _, content in fields:
        if isinstance(content, list):
            found += _messages(content)
    return found


def bytes_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes overwritten, inserted or cut out."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out)))
        match rng.integers(4):
            case 0:
                out[at] = rng.integers(256)
            case 1:
                out[at] ^= 1 << rng.integers(8)
            case 2:
                out[at:at] = rng.bytes(int(rng.integers(1, 8)))
            case 3:
                del out[at : at + int(rng.integers(1, 8))]
    return bytes(out)


def field_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """A field doubled, dropped, moved, renumbered, or written otherwise; lengths around it are right."""
    tree = fields_of(data)
    messages = [message for message in _messages(tree) if message]
    message = messages[rng.integers(len(messages))]
    at = int(rng.integers(len(message)))
    field = message[at]
    number, wire, content = field
    other = messages[rng.integers(len(messages))]
    match rng.integers(14):
        case 0:
            message.insert(int(rng.integers(len(message) + 1)), copy.deepcopy(field))
        case 1:
            del message[at]
        case 2:
            message[at], message[at - 1] = message[at - 1], message[at]
        case 3:
            field[0] = int(rng.integers(1, 30))
        case 4:  # as the first finding: the same field under a tag of more than 32 bits
            field[0] = varint((number << 3 | wire) + (1 << 32))
        case 5:
            field[0] = varint(number << 3 | wire, int(rng.integers(2, 11)))
        case 6:
            field[2] = varint(content, int(rng.integers(2, 11))) if wire == VARINT else content
        case 7:
            field[2] = int(rng.choice([0, 1, 2, 7, 255, -1, 1 << 31, 1 << 32, 1 << 63])) if wire == VARINT else content
        case 8:
            message.insert(at, [int(rng.integers(30, 400)), VARINT, int(rng.integers(1 << 20))])
        case 9:
            message.insert(at, [number, GROUP, varint(number << 3 | GROUP_END)])
        case 10:
            message[at : at + 1] = [[number, DELIMITED, varint(content) * 2]] if wire == VARINT else [field, field]
        case 11:
            texts = [f for m in messages for f in m if isinstance(f[2], bytes) and f[1] == DELIMITED]
            if isinstance(content, bytes) and wire == DELIMITED:
                field[2] = texts[rng.integers(len(texts))][2]
        case 12:
            message.append(copy.deepcopy(other[rng.integers(len(other))]))
        case 13:
            field[1] = int(rng.choice([VARINT, FIXED64, DELIMITED, FIXED32]))
            field[2] = rng.bytes(8) if field[1] == FIXED64 else rng.bytes(4)
    return serialized(tree)


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    attributes = nodes[rng.integers(len(nodes))].attribute
    attribute = attributes[rng.integers(len(attributes))]
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = int(rng.choice([-2, -1, 0, 1, 2, 3, 4, 8, 16, 32, 64, 1 << 40, attribute.i + 1, attribute.i * 2]))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = float(rng.choice([0, -1, 1e30, np.nan, np.inf]))
    else:
        attribute.ints[rng.integers(len(attribute.ints))] = int(rng.integers(-1, 4))


def _input(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """An input of a node becomes another value."""
    graph = model.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    node = graph.node[rng.integers(len(graph.node))]
    node.input[rng.integers(len(node.input))] = names[rng.integers(len(names))]


def _operator(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """An operator becomes another that takes as much."""
    kinds = [["Abs", "Cos", "Exp", "Identity", "Log", "Relu", "Round", "Sin"], ["Add", "Sub", "Mul", "Div", "Max"],
             ["ReduceSum", "ReduceMax", "ReduceSumSquare"]]  # fmt: skip
    for node in rng.permutation(np.arange(len(model.graph.node))):
        for kind in kinds:
            if model.graph.node[node].op_type in kind:
                model.graph.node[node].op_type = str(rng.choice(kind))
                return


def _numbers(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A whole number of a constant: a shape, sizes of a split, axes."""
    constants = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64]
    if constants:
        tensor = constants[rng.integers(len(constants))]
        array = np.frombuffer(tensor.raw_data, np.int64).copy()
        array.flat[rng.integers(array.size)] = rng.choice([-1, 0, 1, 2, 3, 8, 1 << 20, 1 << 40, 1 << 62, -5])
        tensor.raw_data = array.tobytes()


def _dims(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """The shape of a constant, or of what goes in or out."""
    graph = model.graph
    if rng.integers(2) and graph.initializer:
        tensor = graph.initializer[rng.integers(len(graph.initializer))]
        dims = list(tensor.dims)
        rng.shuffle(dims)
        if dims and rng.integers(2):
            dims[rng.integers(len(dims))] = int(rng.choice([0, 1, -1, 7, 1 << 40]))
        del tensor.dims[:]
        tensor.dims.extend(dims)
        return
    values = [*graph.input, *graph.output]
    dims = values[rng.integers(len(values))].type.tensor_type.shape.dim
    if dims:
        dims[rng.integers(len(dims))].dim_value = int(rng.choice([0, 1, 3, 64, 1 << 40]))


def _more(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """One more node in the middle, in the way of a value."""
    graph = model.graph
    at = int(rng.integers(len(graph.node)))
    node = graph.node[at]
    value = node.input[rng.integers(len(node.input))]
    kind = str(rng.choice(["Abs", "Relu", "Identity", "Exp", "Add", "Div", "Concat", "Cast", "Transpose", "Reshape"]))
    attributes: dict[str, Any] = {
        "Concat": {"axis": int(rng.integers(-1, 2))}, "Cast": {"to": int(rng.integers(1, 12))},
        "Transpose": {"perm": list(map(int, rng.permutation(int(rng.integers(1, 4)))))},
    }.get(kind, {})  # fmt: skip
    if kind == "Reshape":
        shape = rng.choice([-1, 1, 2, 8, 64], int(rng.integers(1, 4)))
        graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), "more_shape"))
    inputs = {"Add": 2, "Div": 2, "Concat": int(rng.integers(1, 4))}.get(kind, 1) * [value]
    new = helper.make_node(kind, inputs + ["more_shape"] * (kind == "Reshape"), ["more"], **attributes)
    for i, name in enumerate(node.input):
        if name == value:
            node.input[i] = "more"
    nodes = list(graph.node)
    nodes.insert(at, new)
    del graph.node[:]
    graph.node.extend(nodes)


def _order(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Two nodes change places, or one goes."""
    nodes = list(model.graph.node)
    first, second = rng.integers(len(nodes), size=2)
    nodes[first], nodes[second] = nodes[second], nodes[first]
    if rng.integers(2):
        del nodes[first]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


CHANGES: list[Callable[[onnx.ModelProto, np.random.Generator], None]] = [
    _attribute, _input, _operator, _numbers, _dims, _more, _order,
]  # fmt: skip


def graph_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """Nodes, constants, declarations changed; what comes out is a message that any reader understands alike."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        CHANGES[rng.integers(len(CHANGES))](model, rng)
    return model.SerializeToString()


MUTATIONS = {"bytes": bytes_changed, "fields": field_changed, "nodes": graph_changed}
