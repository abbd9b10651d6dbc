"""An ONNX file as our exporter writes it, read into Python: operators, constants, what goes in and out.

The onnx package is no dependency of the runtime. Field numbers are those of onnx.proto; what a message may hold besides
is refused, since onnxruntime would do something with it.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.wire import BYTES, FLOAT, INT, MESSAGE, TEXT, Field, Refused, Schema, WireError, read

# TensorProto.DataType.
FLOAT32, UINT8, INT64 = 1, 2, 7
ITEM_BYTES = {FLOAT32: 4, UINT8: 1, INT64: 8}
# AttributeProto.AttributeType, and the field that holds such a value.
VALUE_FIELD = {1: "f", 2: "i", 7: "ints"}
EXTERNAL = 1  # TensorProto.DataLocation
IR_VERSION = 10
OPSETS = {"": 21, "com.microsoft": 1, "kvq": 1}
FLATBUFFER = b"ORTM"  # onnxruntime's own format has this at byte 4, and is taken for it whatever else it is

ENTRY = Schema("pair of texts", {1: Field("key", TEXT), 2: Field("value", TEXT)})
TENSOR = Schema(
    "tensor",
    {
        1: Field("dims", INT, many=limits.RANK),
        2: Field("data_type", INT),
        8: Field("name", TEXT),
        9: Field("raw_data", BYTES),
        13: Field("external_data", MESSAGE, many=8, of=ENTRY),
        14: Field("data_location", INT),
    },
)
ATTRIBUTE = Schema(
    "attribute",
    {
        1: Field("name", TEXT),
        2: Field("f", FLOAT),
        3: Field("i", INT),
        5: Field("t", MESSAGE, of=TENSOR),
        8: Field("ints", INT, many=limits.INLINE_NUMBERS),
        10: Field("tensors", MESSAGE, many=1, of=TENSOR),
        20: Field("type", INT),
    },
    {
        4: "a node holds a text",
        6: "a node holds a subgraph",
        9: "a node holds texts",
        11: "a node holds subgraphs",
        21: "a node refers to an attribute of a function",
        22: "a node holds a sparse tensor",
        23: "a node holds sparse tensors",
    },
)
NODE = Schema(
    "node",
    {
        1: Field("input", TEXT, many=limits.INPUTS),
        2: Field("output", TEXT, many=limits.OUTPUTS),
        3: Field("name", TEXT),
        4: Field("op_type", TEXT),
        5: Field("attribute", BYTES, many=16),
        7: Field("domain", TEXT),
    },
    {8: "a node names an overload of a function"},
)
DIMENSION = Schema("dimension", {1: Field("dim_value", INT), 2: Field("dim_param", TEXT)})
SHAPE = Schema("shape", {1: Field("dim", MESSAGE, many=limits.RANK, of=DIMENSION)})
TENSOR_TYPE = Schema("tensor type", {1: Field("elem_type", INT), 2: Field("shape", MESSAGE, of=SHAPE)})
TYPE = Schema(
    "type", {1: Field("tensor_type", MESSAGE, of=TENSOR_TYPE)}, dict.fromkeys((4, 5, 8, 9), "a value is no tensor")
)
VALUE_INFO = Schema("declaration", {1: Field("name", TEXT), 2: Field("type", MESSAGE, of=TYPE)})
GRAPH = Schema(
    "graph",
    {
        1: Field("node", MESSAGE, many=limits.ENTRIES, of=NODE),
        2: Field("name", TEXT),
        5: Field("initializer", BYTES, many=limits.ENTRIES),
        11: Field("input", MESSAGE, many=16, of=VALUE_INFO),
        12: Field("output", MESSAGE, many=16, of=VALUE_INFO),
    },
    {14: "it holds quantization annotations", 15: "it holds sparse initializers", 16: "it holds metadata"},
)
OPSET = Schema("operator set", {1: Field("domain", TEXT), 2: Field("version", INT)})
MODEL = Schema(
    "model",
    {
        1: Field("ir_version", INT),
        2: Field("producer_name", TEXT),
        7: Field("graph", MESSAGE, of=GRAPH),
        8: Field("opset_import", MESSAGE, many=8, of=OPSET),
    },
    {14: "it holds metadata", 20: "it holds training information", 25: "it defines functions"},
)


class Region(NamedTuple):
    """Bytes of the file of weights, from `offset` on."""

    offset: int
    nbytes: int


class Tensor(NamedTuple):
    """A constant: where its bytes are, in `raw` or in a region of the file of weights."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    raw: bytes
    region: Region | None

    def numbers(self) -> tuple[int, ...]:
        """The whole numbers of an int64 tensor inside the graph."""
        return struct.unpack(f"<{len(self.raw) // 8}q", self.raw)


class Node(NamedTuple):
    """An operator at work. An attribute is an int, a float, or a tuple of ints."""

    name: str
    operator: str  # with its domain, if it has one: kvq::Attention
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class Declared(NamedTuple):
    """What a graph takes or yields; a dimension is a size, or the name of one that is free."""

    name: str
    dtype: int
    dims: tuple[int | str, ...]


class Graph(NamedTuple):
    """A graph, as it is in the file."""

    nodes: list[Node]
    constants: list[Tensor]
    inputs: list[Declared]
    outputs: list[Declared]
    opsets: dict[str, int]


class GraphReader:
    """Reads graphs; what many graphs of a bundle hold alike is read once."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[bytes, frozenset[str]], Tensor] = {}
        self._attributes: dict[bytes, tuple[str, Any]] = {}

    def read(self, data: bytes, external_files: frozenset[str]) -> Graph:
        """The graph of an ONNX file.

        Args:
            data: of the file.
            external_files: names that a constant may keep its data in.

        Raises:
            WireError: no ONNX file, or one that two readers may understand differently.
            Refused: something in it that no graph of ours holds.
        """
        if data[4:8] == FLATBUFFER:
            raise Refused("it is in onnxruntime's own format, not in ONNX")
        model: dict[str, Any] = read(data, MODEL)
        if model.get("ir_version") != IR_VERSION:
            raise Refused(f"its IR version is {model.get('ir_version')}, not {IR_VERSION}")
        if "graph" not in model:
            raise Refused("it holds no graph")
        opsets: dict[str, int] = {}
        for entry in model.get("opset_import", ()):
            domain = entry.get("domain", "")
            if domain in opsets or OPSETS.get(domain) != entry.get("version"):
                raise Refused(f"it is of version {entry.get('version')} of the operators {domain or 'ai.onnx'!r:.60}")
            opsets[domain] = entry["version"]
        graph = model["graph"]
        nodes = [self.node(node, external_files) for node in graph.get("node", ())]
        if foreign := {node.get("domain", "") for node in graph.get("node", ())} - opsets.keys():
            operators = {f"{node.get('domain')}::{node.get('op_type')}" for node in graph["node"]}
            wanted = sorted(name for name in operators if name.partition("::")[0] in foreign)
            raise Refused(f"operator {', '.join(wanted)!s:.60} is of a set that it does not import")
        names = [node.name for node in nodes if node.name]
        if len(set(names)) < len(names):
            raise Refused("two operators have the same name")
        constants = [self.tensor(content, external_files) for content in graph.get("initializer", ())]
        inputs, outputs = ([_declared(entry) for entry in graph.get(side, ())] for side in ("input", "output"))
        return Graph(nodes, constants, inputs, outputs, opsets)

    def node(self, node: dict[str, Any], external_files: frozenset[str]) -> Node:
        """An operator at work, from the fields of its message.

        Raises:
            Refused: something in it that no graph of ours holds.
        """
        attributes: dict[str, Any] = {}
        for content in node.get("attribute", ()):
            known = self._attributes.get(content)
            if known is None:
                known = self._attributes[content] = _attribute(content, external_files)
            if known[0] in attributes:
                raise Refused(f"a node says {known[0]} twice")
            attributes[known[0]] = known[1]
        domain, name = node.get("domain", ""), node.get("op_type", "")
        operator = f"{domain}::{name}" if domain else name
        return Node(node.get("name", ""), operator, node.get("input", []), node.get("output", []), attributes)

    def tensor(self, content: bytes, external_files: frozenset[str]) -> Tensor:
        """A constant, from its message.

        Raises:
            WireError, Refused: as for `read`.
        """
        key = content, external_files
        known = self._tensors.get(key)
        if known is None:
            known = tensor_of(read(content, TENSOR), external_files)
            if len(content) < limits.PAGE:
                self._tensors[key] = known
        return known


def tensor_of(tensor: dict[str, Any], external_files: frozenset[str]) -> Tensor:
    """A constant, whose bytes are as many as its shape asks for.

    Raises:
        Refused: they are not, or stand in another file, or it is of another type than ours.
    """
    name = tensor.get("name", "")
    entries = tensor.get("external_data", [])
    for entry in entries:
        if entry.get("key") == "location" and entry.get("value", "") not in external_files:
            raise Refused(f"it reads external data from {entry.get('value', '')!r:.100}")
    dims, dtype = tuple(tensor.get("dims", ())), tensor.get("data_type", 0)
    if not 0 < len(name) <= limits.NAMES:
        raise Refused("a constant has no name, or a name that is too long")
    if dtype not in ITEM_BYTES:
        raise Refused(f"constant {name!r:.60} is of type {dtype}")
    if len(dims) > limits.RANK or not all(0 < size < limits.NUMBER for size in dims):
        raise Refused(f"constant {name!r:.60} has the shape {dims!r:.60}")
    nbytes = ITEM_BYTES[dtype]
    for size in dims:
        nbytes *= size
    if entries or tensor.get("data_location", 0):
        if tensor.get("data_location") != EXTERNAL or "raw_data" in tensor:
            raise Refused(f"the data of constant {name!r:.60} is in two places, or in none")
        return Tensor(name, dtype, dims, b"", _region(name, entries, nbytes))
    raw = tensor.get("raw_data", b"")
    if len(raw) != nbytes:
        raise Refused(f"constant {name!r:.60} of shape {dims} has {len(raw)} bytes")
    return Tensor(name, dtype, dims, raw, None)


def _region(name: str, entries: list[dict[str, str]], nbytes: int) -> Region:
    found = {entry.get("key", ""): entry.get("value", "") for entry in entries}
    if len(entries) != 3 or found.keys() != {"location", "offset", "length"}:
        keys = sorted(entry.get("key", "") for entry in entries)
        raise Refused(f"the external data of {name!r:.60} is given by {keys!r:.100}")
    for key in ("offset", "length"):
        digits = found[key]
        # As they were written: other readers take signs, spaces, leading zeros, or stop at the first letter.
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 16 and str(int(digits)) == digits):
            raise Refused(f"the {key} of {name!r:.60} is {digits!r:.40}")
    region = Region(int(found["offset"]), int(found["length"]))
    if region.nbytes != nbytes:
        raise Refused(f"constant {name!r:.60} has {region.nbytes} bytes of external data, its shape asks for {nbytes}")
    if region.offset % limits.ALIGNMENT:
        raise Refused(f"the external data of {name!r:.60} begins at {region.offset}, which is not aligned")
    return region


def _attribute(content: bytes, external_files: frozenset[str]) -> tuple[str, Any]:
    """Name and value."""
    attribute: dict[str, Any] = read(content, ATTRIBUTE)
    for tensor in (*([attribute["t"]] if "t" in attribute else []), *attribute.get("tensors", ())):
        tensor_of(tensor, external_files)  # what it is refused for, if there is something worse
        raise Refused("a node holds a tensor")
    name, field = attribute.get("name", ""), VALUE_FIELD.get(attribute.get("type", 0))
    values = attribute.keys() - {"name", "type"}
    # An empty list is not written at all.
    if not name or field is None or values != {field}:
        raise Refused(f"attribute {name!r:.60} has no value of its type")
    value = attribute[field]
    if field == "f" and not math.isfinite(value):
        raise Refused(f"attribute {name!r:.60} is {value}")
    return name, tuple(value) if field == "ints" else value


def _declared(entry: dict[str, Any]) -> Declared:
    """An input or output of a graph."""
    name = entry.get("name", "")
    tensor = entry.get("type", {}).get("tensor_type", {})
    if not name or "shape" not in tensor or "elem_type" not in tensor:
        raise Refused(f"it does not say what {name!r:.60} is")
    dims: list[int | str] = []
    for dim in tensor["shape"].get("dim", ()):
        if len(dim) != 1:
            raise Refused(f"a dimension of {name!r:.60} is nothing, or two things")
        dims.append(dim["dim_value"] if "dim_value" in dim else dim["dim_param"])
    return Declared(name, tensor["elem_type"], tuple(dims))


__all__ = ["Declared", "Graph", "GraphReader", "Node", "Refused", "Region", "Tensor", "WireError"]
