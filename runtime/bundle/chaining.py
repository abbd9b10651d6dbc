"""Nodes of a checked graph that follow one another, as one: Product, AddNorm and SwiGLU between two layers' attention.

A node of a step takes a few microseconds besides its work, and so does every time that threads are asked to help. Where
products are the native library's (`kvq.runtime.bundle.renaming`), what stands between them is as well, and one Chain
does all of it, in a step with threads that stay together. A graph is rewritten in memory; no file has a Chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvq.runtime.bundle.onnx_file import GraphReader, Node
from kvq.runtime.bundle.renaming import (
    DOMAIN,
    FILES,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    MODEL_GRAPH,
    PRODUCT,
    Attributes,
    GraphNodes,
    node_of,
)
from kvq.runtime.bundle.wire import field, fields

CHAIN = "Chain"
PRODUCTS, ADD_NORM, SWIGLU = (f"{DOMAIN}::{name}" for name in (PRODUCT, "AddNorm", "SwiGLU"))
MOST_GAINS = 2  # AddNorms of a chain

Take = Callable[[Sequence[Node]], Attributes]


class _Run(NamedTuple):
    """Nodes that become one: their places, the residual stream that they begin with and leave, and the gains."""

    places: list[int]
    residual: str
    left: str
    gains: list[str]


def with_chains(graph: bytes, take: Take) -> bytes:
    """A graph with a Chain in the place of nodes that follow one another, the first a Product, one at least an AddNorm.

    Args:
        graph: as `kvq.runtime.bundle.renaming.with_products` gives it.
        take: the attributes of the Chain for its nodes, whole numbers from 0 on.
    """
    return b"".join(
        field(number, wire, _graph(content, take) if number == MODEL_GRAPH else content)
        for number, wire, content in fields(graph)
    )


class _Followers(GraphNodes):
    """Nodes that chains are found among.

    Args:
        parts: of the graph's message.
    """

    def __init__(self, parts: list[tuple[int, int, bytes]]) -> None:
        super().__init__(parts)
        reader = GraphReader()
        self._constants = {reader.tensor(part[2], FILES).name for part in parts if part[0] == GRAPH_INITIALIZER}

    def run(self, first: int) -> _Run | None:
        """What a Product begins."""
        places, residual, left, gains = [first], "", "", list[str]()
        out = self.at[first].outputs[0]
        while len(readers := self.readers[out]) == 1 and readers[0] in self.at:
            node = self.at[readers[0]]
            if node.operator == ADD_NORM:
                stream, added, gain = node.inputs
                fits = added == out != stream and gain in self._constants and len(gains) < MOST_GAINS
                if not fits or not (self._goes_on(left, stream) if gains else self.made_at.get(stream, -1) < first):
                    break
                residual, left = residual or stream, node.outputs[0]
                gains.append(gain)
            elif node.operator not in (PRODUCTS, SWIGLU):
                break
            places.append(readers[0])
            out = node.outputs[-1]
        # What else reads the residual stream has to come behind all of it.
        if not gains or any(i < places[-1] for i in self.readers[left]):
            return None
        return _Run(places, residual, left, gains)

    def _goes_on(self, left: str, stream: str) -> bool:
        return left == stream and len(self.readers[left]) == 1


def _graph(graph: bytes, take: Take) -> bytes:
    parts = list(fields(graph))
    nodes = _Followers(parts)
    taken, gone = set[int](), set[int]()
    for i, node in nodes.at.items():
        if i in taken or node.operator != PRODUCTS or (run := nodes.run(i)) is None:
            continue
        last = run.places[-1]
        inputs = [node.inputs[0], run.residual, *run.gains]
        outputs = [run.left, nodes.at[last].outputs[-1]]
        attributes = take([nodes.at[place] for place in run.places])
        parts[last] = GRAPH_NODE, parts[last][1], node_of(CHAIN, inputs, outputs, attributes)
        taken.update(run.places)
        gone.update(run.places[:-1])
    return b"".join(field(*part) for i, part in enumerate(parts) if i not in gone)
