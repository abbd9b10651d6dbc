"""Nodes of a checked graph that follow one another, as one: products, norms, activations and attention of all layers.

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
PRODUCTS, ADD_NORM, SWIGLU, ATTENTION = (f"{DOMAIN}::{name}" for name in (PRODUCT, "AddNorm", "SwiGLU", "Attention"))

Take = Callable[[Sequence[Node]], Attributes]


class _Run(NamedTuple):
    """Nodes that become one: their places, the residual stream before and behind them, and what else they take."""

    places: list[int]
    residual: str
    left: str
    taken: list[str]


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
        places, residual, left, taken = [first], "", "", list[str]()
        out = self.at[first].outputs[0]
        ends = 1, 0  # how many places and taken names there are where a chain may end: not with attention
        while len(readers := self.readers[out]) == 1 and readers[0] in self.at:
            node = self.at[readers[0]]
            if self.at[places[-1]].operator == ATTENTION and node.operator != PRODUCTS:
                break
            if node.operator == ADD_NORM:
                stream, added, gain = node.inputs
                fits = added == out != stream and gain in self._constants
                if not fits or not (self._goes_on(left, stream) if left else self._before(first, [stream])):
                    break
                residual, left = residual or stream, node.outputs[0]
                taken.append(gain)
            elif node.operator == ATTENTION:
                qkv, *others = node.inputs
                if qkv != out or not self._before(first, others):
                    break
                taken += others
            elif node.operator not in (PRODUCTS, SWIGLU):
                break
            places.append(readers[0])
            out = node.outputs[-1]
            if node.operator != ATTENTION:
                ends = len(places), len(taken)
        places, taken = places[: ends[0]], taken[: ends[1]]
        # What else reads the residual stream has to come behind all of it.
        if not left or any(i < places[-1] for i in self.readers[left]):
            return None
        return _Run(places, residual, left, taken)

    def _before(self, place: int, names: Sequence[str]) -> bool:
        """Whether all these are there before a node: constants, what the graph is given, what nodes before it yield."""
        return all(self.made_at.get(name, -1) < place for name in names)

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
        inputs = [node.inputs[0], run.residual, *run.taken]
        outputs = [run.left, nodes.at[last].outputs[-1]]
        attributes = take([nodes.at[place] for place in run.places])
        parts[last] = GRAPH_NODE, parts[last][1], node_of(CHAIN, inputs, outputs, attributes)
        taken.update(run.places)
        gone.update(run.places[:-1])
    return b"".join(field(*part) for i, part in enumerate(parts) if i not in gone)
