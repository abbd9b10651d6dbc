"""Products of a checked graph handed to others: MatMulNBits of onnxruntime becomes Product of the native library.

Both compute the same from the same weights; which one runs is a matter of the machine, so a bundle does not say it. A
graph is rewritten in memory, after it was checked; no file has a Product.

Where blocks of weights have offsets, three more nodes add what those come to, and a Product takes the place of all:
Gemm(ReduceSum(Reshape(x)), offsets, MatMulNBits(x)).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.bundle.onnx_file import NODE, OPSET, OPSETS, VALUE_INFO, GraphReader, Node, Region
from kvq.runtime.bundle.wire import DELIMITED, VARINT, field, fields, read, varint

DOMAIN, PRODUCT, MATMUL = "kvq", "Product", "com.microsoft::MatMulNBits"
FILES = frozenset((WEIGHTS,))
INT8_ACTIVATIONS = 4  # accuracy level
# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_OPSET, GRAPH_NODE, GRAPH_INITIALIZER = 7, 8, 1, 5
GRAPH_OUTPUT = 12
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_TYPE, TYPE_INT = 1, 3, 20, 2


class Matrix(NamedTuple):
    """A matrix of a MatMulNBits with int8 activations: its numbers, and where its parts are in the file of weights.

    Attributes:
        n, k, bits, block: rows, columns, bits of a code, weights that share a scale.
        codes, scales, zeros, offsets: of the parts; zeros or offsets None: there are none.
    """

    n: int
    k: int
    bits: int
    block: int
    codes: Region
    scales: Region
    zeros: Region | None
    offsets: Region | None = None


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


class GraphNodes:
    """The nodes of a graph by their places in its message, and who makes and reads what.

    Args:
        parts: of the message.

    Attributes:
        at: node by place.
        made_at: place by the name of what a node yields.
        readers: places by the name of what nodes read, of what the graph yields also one behind all of them.
    """

    def __init__(self, parts: list[tuple[int, int, bytes]]) -> None:
        reader = GraphReader()
        self.at = {i: reader.node(read(part[2], NODE), FILES) for i, part in enumerate(parts) if part[0] == GRAPH_NODE}
        self.made_at = {name: i for i, node in self.at.items() for name in node.outputs}
        self.readers = defaultdict[str, list[int]](list)
        for i, node in self.at.items():
            for name in node.inputs:
                self.readers[name].append(i)
        for part in parts:
            if part[0] == GRAPH_OUTPUT:
                self.readers[read(part[2], VALUE_INFO)["name"]].append(len(parts))


class _Nodes(GraphNodes):
    """Nodes that products are found among.

    Args:
        parts: of the message.
        regions: of its constants.
    """

    def __init__(self, parts: list[tuple[int, int, bytes]], regions: dict[str, Region | None]) -> None:
        super().__init__(parts)
        self._regions = regions
        self._reads = Counter({name: len(places) for name, places in self.readers.items()})  # fewer as nodes go

    def product(self, i: int) -> tuple[list[int], Matrix] | None:
        """Of a product that node i yields: its MatMulNBits, the other nodes that it takes, and its matrix."""
        node = self.at[i]
        if node.operator == MATMUL:
            found = _matrix(node, self._regions)
            return ([i], found) if found else None
        if node.operator != "Gemm" or len(node.inputs) < 3 or not node.attributes.get("transB"):
            return None
        totals, offsets, product = node.inputs
        at, summed, region = self._maker(product, MATMUL), self._maker(totals, "ReduceSum"), self._regions.get(offsets)
        cut = None if summed is None else self._maker(self.at[summed].inputs[0], "Reshape")
        if at is None or summed is None or cut is None or region is None or self._reads[product] > 1:
            return None
        found = _matrix(self.at[at], self._regions)
        if found is None or found.bits != 4 or found.zeros is not None:  # the library has no others with offsets
            return None
        if self.at[cut].inputs[0] != self.at[at].inputs[0]:
            return None
        return [at, summed, cut], found._replace(offsets=region)

    def _maker(self, name: str, operator: str) -> int | None:
        place = self.made_at.get(name)
        return place if place in self.at and self.at[place].operator == operator else None

    def become_product(self, i: int, places: list[int]) -> set[int]:
        """Let node i take over what those in `places` do for it; returns those that nobody needs any more."""
        x = self.at[places[0]].inputs[0]
        self._reads.subtract(self.at[i].inputs)
        self._reads[x] += 1
        self.at[i] = self.at[i]._replace(operator=f"{DOMAIN}::{PRODUCT}", inputs=[x])
        dropped = set()
        for place in places:
            if place != i and not any(self._reads[name] for name in self.at[place].outputs):
                self._reads.subtract(self.at.pop(place).inputs)
                dropped.add(place)
        return dropped

    def uses(self, name: str) -> bool:
        """Whether a node or the graph's outcome reads a value."""
        return self._reads[name] > 0


def _graph(graph: bytes, take: Callable[[Matrix], Attributes | None]) -> bytes:
    reader, parts = GraphReader(), list(fields(graph))
    tensors = [reader.tensor(content, FILES) for number, _, content in parts if number == GRAPH_INITIALIZER]
    nodes = _Nodes(parts, {tensor.name: tensor.region for tensor in tensors})
    left_out: set[int] = set()
    for i in sorted(nodes.at, reverse=True):  # what adds to a product stands behind it
        found = nodes.product(i) if i in nodes.at else None
        attributes = take(found[1]) if found else None
        if found and attributes is not None:
            left_out |= nodes.become_product(i, found[0])
            product = nodes.at[i]
            parts[i] = GRAPH_NODE, parts[i][1], node_of(PRODUCT, product.inputs, product.outputs, attributes)
    names = iter(tensor.name for tensor in tensors)
    kept = (
        part
        for i, part in enumerate(parts)
        if i not in left_out and (part[0] != GRAPH_INITIALIZER or nodes.uses(next(names)))
    )
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


def node_of(operator: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> bytes:
    """A node of the library's operators, its attributes whole numbers."""
    kept = [field(NODE_INPUT, DELIMITED, name.encode()) for name in inputs]
    kept += [field(NODE_OUTPUT, DELIMITED, name.encode()) for name in outputs]
    names = ((NODE_NAME, outputs[-1]), (NODE_OPERATOR, operator), (NODE_DOMAIN, DOMAIN))
    kept += [field(number, DELIMITED, name.encode()) for number, name in names]
    for name, value in attributes.items():
        attribute = ((ATTRIBUTE_INT, VARINT, varint(value)), (ATTRIBUTE_TYPE, VARINT, varint(TYPE_INT)))
        content = b"".join(field(*part) for part in ((ATTRIBUTE_NAME, DELIMITED, name.encode()), *attribute))
        kept.append(field(NODE_ATTRIBUTE, DELIMITED, content))
    return b"".join(kept)
