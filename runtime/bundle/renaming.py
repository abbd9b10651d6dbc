"""Products of a checked graph handed to others: MatMulNBits of onnxruntime becomes Product of the native library.

Both compute the same from the same weights; which one runs is a matter of the machine, so a bundle does not say it. A
graph is rewritten in memory, after it was checked; no file has a Product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.bundle.onnx_file import NODE, OPSET, OPSETS, GraphReader, Node, Region
from kvq.runtime.bundle.wire import DELIMITED, VARINT, field, fields, read, varint

DOMAIN, PRODUCT, MATMUL = "kvq", "Product", "com.microsoft::MatMulNBits"
FILES = frozenset((WEIGHTS,))
INT8_ACTIVATIONS = 4  # accuracy level
# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_OPSET, GRAPH_NODE, GRAPH_INITIALIZER = 7, 8, 1, 5
NODE_INPUT, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_TYPE, TYPE_INT = 1, 3, 20, 2


class Matrix(NamedTuple):
    """A matrix of a MatMulNBits with int8 activations: its numbers, and where its parts are in the file of weights.

    Attributes:
        n, k, bits, block: rows, columns, bits of a code, weights that share a scale.
        codes, scales, zeros: of the parts; zeros None: there are none.
    """

    n: int
    k: int
    bits: int
    block: int
    codes: Region
    scales: Region
    zeros: Region | None


Attributes = dict[str, int]


def with_products(graph: bytes, take: Callable[[Matrix], Attributes | None]) -> bytes:
    """A graph with Product in the place of MatMulNBits, whose input is x alone. Weights no longer used are left out.

    Args:
        graph: an ONNX file that `kvq.runtime.bundle.guard.check_graph` has understood.
        take: the attributes of the Product for a matrix, whole numbers from 0 on; None leaves the product as it is.
    """
    found: list[bytes] = []
    taken = False
    for number, wire, content in fields(graph):
        if number == MODEL_GRAPH:
            changed = _graph(content, take)
            taken, content = changed != content, changed
        found.append(field(number, wire, content))
    opsets = [read(content, OPSET) for number, _, content in fields(graph) if number == MODEL_OPSET]
    if taken and not any(entry.get("domain") == DOMAIN for entry in opsets):
        opset = field(1, DELIMITED, DOMAIN.encode()) + field(2, VARINT, varint(OPSETS[DOMAIN]))
        found.append(field(MODEL_OPSET, DELIMITED, opset))
    return b"".join(found) if taken else graph


def rows_alike(graph: bytes) -> bool:
    """Whether the products of a graph give a row of activations the same bits among several as alone.

    The library's do. onnxruntime's sum a single row in another order than several, so none of them may be left but
    those whose rows are blocks of the activations', of which there are several for every one.

    graph: as of `with_products`.
    """
    reader, made_by = GraphReader(), dict[str, str]()
    for content in (part for number, _, part in fields(graph) if number == MODEL_GRAPH):
        for node in (
            reader.node(read(part, NODE), FILES) for number, _, part in fields(content) if number == GRAPH_NODE
        ):
            blocks = node.operator == "MatMul" and made_by.get(node.inputs[0]) == "Reshape"
            if node.operator in (MATMUL, "MatMul", "Gemm") and not blocks:
                return False
            made_by |= dict.fromkeys(node.outputs, node.operator)
    return True


def _graph(graph: bytes, take: Callable[[Matrix], Attributes | None]) -> bytes:
    reader, parts = GraphReader(), list(fields(graph))
    tensors = [reader.tensor(content, FILES) for number, _, content in parts if number == GRAPH_INITIALIZER]
    regions = {tensor.name: tensor.region for tensor in tensors}
    used: set[str] = set()
    for i, (number, wire, content) in enumerate(parts):
        if number != GRAPH_NODE:
            continue
        node = reader.node(read(content, NODE), FILES)
        matrix = _matrix(node, regions) if node.operator == MATMUL else None
        attributes = take(matrix) if matrix else None
        if attributes is None:
            used.update(node.inputs)
        else:
            parts[i] = number, wire, _product(content, attributes)
    names = iter(tensor.name for tensor in tensors)
    kept = (part for part in parts if part[0] != GRAPH_INITIALIZER or next(names) in used)
    return b"".join(field(*part) for part in kept)


def _matrix(node: Node, regions: dict[str, Region | None]) -> Matrix | None:
    """What a MatMulNBits multiplies with, if its activations are int8 and its weights in the file."""
    numbers, parts = node.attributes, [regions.get(name) for name in node.inputs[1:]]
    if numbers["accuracy_level"] != INT8_ACTIVATIONS:
        return None
    codes, scales, *zeros = parts
    if codes is None or scales is None or None in zeros:
        return None
    n, k, bits, block = (numbers[name] for name in ("N", "K", "bits", "block_size"))
    return Matrix(n, k, bits, block, codes, scales, zeros[0] if zeros else None)


def _product(node: bytes, attributes: Attributes) -> bytes:
    """A MatMulNBits as a Product: its first input, its output and its name."""
    kept, inputs = [], 0
    for number, wire, content in fields(node):
        inputs += number == NODE_INPUT
        if number not in (NODE_OPERATOR, NODE_DOMAIN, NODE_ATTRIBUTE) and (number != NODE_INPUT or inputs == 1):
            kept.append(field(number, wire, content))
    names = ((NODE_OPERATOR, PRODUCT), (NODE_DOMAIN, DOMAIN))
    kept += [field(number, DELIMITED, name.encode()) for number, name in names]
    for name, value in attributes.items():
        attribute = ((ATTRIBUTE_INT, VARINT, varint(value)), (ATTRIBUTE_TYPE, VARINT, varint(TYPE_INT)))
        content = b"".join(field(*part) for part in ((ATTRIBUTE_NAME, DELIMITED, name.encode()), *attribute))
        kept.append(field(NODE_ATTRIBUTE, DELIMITED, content))
    return b"".join(kept)
