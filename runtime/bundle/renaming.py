"""Products of a checked graph handed to the native library: MatMulNBits of onnxruntime becomes Product of ours.

Both compute the same from the same weights; which one runs is a matter of the machine, so a bundle does not say it. A
graph is rewritten in memory after it was checked. What is not rewritten, other block sizes and float32 activations, is
left to onnxruntime.
"""

from __future__ import annotations

from kvq.runtime.bundle.onnx_file import NODE, OPSETS, GraphReader, Node
from kvq.runtime.bundle.wire import DELIMITED, VARINT, field, fields, read, varint

DOMAIN, PRODUCT, MATMUL = "kvq", "Product", "com.microsoft::MatMulNBits"
LEAST_ROWS = 32  # of a matrix, columns of the product: what the widest kernel makes together
BLOCKS = (32, 64, 128, 256)

# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_OPSET, GRAPH_NODE, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 7, 8, 1, 4, 5, 7


def takes(node: Node) -> bool:
    """Whether the library computes what an operator does."""
    numbers = node.attributes
    if node.operator != MATMUL or numbers["accuracy_level"] != 4 or numbers["N"] < LEAST_ROWS:
        return False
    return numbers["block_size"] in BLOCKS and (numbers["bits"] == 4 or len(node.inputs) == 3)


def with_products(graph: bytes, kernel: int) -> bytes:
    """A graph with the library's products in it, where it has them.

    Args:
        graph: an ONNX file that `kvq.runtime.bundle.guard.check_graph` has understood.
        kernel: index of the instruction set, see `kvq.runtime.native.library.kernels`.
    """
    reader, found = GraphReader(), []
    renamed = imported = False
    for number, wire, content in fields(graph):
        if number == MODEL_GRAPH:
            parts = []
            for inner, kind, part in fields(content):
                if inner == GRAPH_NODE and takes(reader.node(read(part, NODE), frozenset())):
                    part, renamed = _renamed(part, kernel), True
                parts.append(field(inner, kind, part))
            content = b"".join(parts)
        elif number == MODEL_OPSET and DOMAIN.encode() in content:
            imported = True
        found.append(field(number, wire, content))
    if renamed and not imported:
        opset = field(1, DELIMITED, DOMAIN.encode()) + field(2, VARINT, varint(OPSETS[DOMAIN]))
        found.append(field(MODEL_OPSET, DELIMITED, opset))
    return b"".join(found) if renamed else graph


def _renamed(node: bytes, kernel: int) -> bytes:
    """A MatMulNBits as a Product, with one attribute more."""
    kept = [field(*part) for part in fields(node) if part[0] not in (NODE_OPERATOR, NODE_DOMAIN)]
    attribute = field(1, DELIMITED, b"kernel") + field(3, VARINT, varint(kernel)) + field(20, VARINT, varint(2))
    kept.append(field(NODE_ATTRIBUTE, DELIMITED, attribute))
    names = ((NODE_OPERATOR, PRODUCT), (NODE_DOMAIN, DOMAIN))
    return b"".join((*kept, *(field(number, DELIMITED, name.encode()) for number, name in names)))
