"""Look into an ONNX file before onnxruntime does: operators and external data, nothing else.

A bundle comes from anywhere. onnxruntime runs whatever operators a graph names and follows
its external-data paths, so both are checked first against what our own exporter writes. The
reader below walks the protobuf wire format (https://protobuf.dev/programming-guides/encoding/)
through the few message fields it needs; the onnx package is not a runtime dependency.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvq.runtime.errors import BundleError

# Wire types.
VARINT, DELIMITED, FIXED_BYTES = 0, 2, {1: 8, 5: 4}
# Field numbers from onnx.proto3, message by message.
MODEL_GRAPH, MODEL_FUNCTIONS = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_OP_TYPE, NODE_ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
TENSOR_EXTERNAL_DATA = 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS = 5, 10
# Subgraphs and sparse tensors in attributes: our graphs have neither.
ATTRIBUTE_REFUSED = {6: "subgraph", 11: "subgraphs", 22: "sparse tensor", 23: "sparse tensors"}

OPERATORS = {
    "": (
        "Abs", "Add", "Cast", "Concat", "Cos", "Div", "Exp", "Gather", "Gemm", "Identity", "Log", "LogSoftmax",
        "MatMul", "Max", "Mul", "Pad", "ReduceMax", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round",
        "SimplifiedLayerNormalization", "Sin", "Slice", "Split", "Sub", "Transpose",
    ),
    "com.microsoft": ("MatMulNBits", "QuickGelu", "RotaryEmbedding"),
    "kvq": ("AddNorm", "Attention", "SwiGLU"),
}  # fmt: skip
ALLOWED_OPERATORS = {(domain, name) for domain, names in OPERATORS.items() for name in names}


def check_graph(data: bytes, name: str, external_files: set[str]) -> None:
    """Refuse a serialized ONNX model that is not of the kind our exporter writes.

    Args:
        data: the file's bytes.
        name: file name, for the message.
        external_files: names an initializer may keep its data in, relative to the bundle.

    Raises:
        BundleError: unreadable protobuf, a foreign operator, a subgraph, a function, or
            external data outside `external_files`.
    """
    try:
        for field, value in _fields(data):
            if field == MODEL_FUNCTIONS:
                raise _refused(name, "it defines functions")
            if field == MODEL_GRAPH:
                _check_graph(value, name, external_files)
    except (IndexError, ValueError):
        raise BundleError(f"{name} is not a readable ONNX file; export the bundle again") from None


def _check_graph(graph: memoryview, name: str, external_files: set[str]) -> None:
    for field, value in _fields(graph):
        if field == GRAPH_SPARSE:
            raise _refused(name, "it holds sparse initializers")
        if field == GRAPH_INITIALIZER:
            _check_tensor(value, name, external_files)
        elif field == GRAPH_NODE:
            _check_node(value, name, external_files)


def _check_node(node: memoryview, name: str, external_files: set[str]) -> None:
    operator = domain = ""
    for field, value in _fields(node):
        if field == NODE_OP_TYPE:
            operator = bytes(value).decode()
        elif field == NODE_DOMAIN:
            domain = bytes(value).decode()
        elif field == NODE_ATTRIBUTE:
            for kind, content in _fields(value):
                if kind in ATTRIBUTE_REFUSED:
                    raise _refused(name, f"a node holds a {ATTRIBUTE_REFUSED[kind]}")
                if kind in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
                    _check_tensor(content, name, external_files)
    if (domain, operator) not in ALLOWED_OPERATORS:
        raise _refused(name, f"operator {domain + '::' if domain else ''}{operator!s} is not one the exporter writes")


def _check_tensor(tensor: memoryview, name: str, external_files: set[str]) -> None:
    for field, value in _fields(tensor):
        if field == TENSOR_EXTERNAL_DATA:
            entry = {kind: bytes(content).decode() for kind, content in _fields(value)}
            location = entry.get(ENTRY_VALUE, "")
            if entry.get(ENTRY_KEY) == "location" and location not in external_files:
                raise _refused(name, f"it reads external data from {location!r}")


def _refused(name: str, why: str) -> BundleError:
    return BundleError(f"{name} is refused: {why}; export the bundle again with kvq export")


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, content) of a message's length-delimited fields; numbers are passed over."""
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = _varint(view, at)
        field, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, at = _varint(view, at)
            continue
        if kind == DELIMITED:
            size, at = _varint(view, at)
        elif kind in FIXED_BYTES:
            size = FIXED_BYTES[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(view):
            raise ValueError("field runs past the end")
        if kind == DELIMITED:
            yield field, view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
