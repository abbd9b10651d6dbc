"""Which matrices can do with few bits: what each does to the model's predictions, measured, and a plan that follows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from kvq.exporter.draft import Draft, State, products
from kvq.exporter.weights.quantize import QuantizedMatrix, quantize_matrix

# Tokens that are read, and how many apart those are whose predictions are compared: these cost as much as layers.
PROBED_TOKENS, APART = 256, 4
STEPS = (8, 6, 5, 4)  # bits
FEW, MANY = STEPS[-1], STEPS[0]


class Damage(NamedTuple):
    """What a matrix in few bits does.

    weights: it has.
    divergence: mean KL in nats from the draft's predictions.
    """

    weights: int
    divergence: float


def damages(draft: Draft, block: int, progress: Callable[[int, int], None] | None = None) -> dict[str, Damage]:
    """Damage of every matrix of the layers in few bits, all others in many, on the first tokens of a draft's text.

    A changed segment is run on what it takes in the unchanged model, and from there on all that follow.

    Args:
        draft: the model.
        block: weights that share a scale.
        progress: called with the matrices done and all there are.
    """
    graphs = [draft.graph(name) for name in draft.segments]
    sessions = [draft.session(graph) for graph in graphs]
    head = draft.session(draft.graph(draft.head))
    states = [{name: x[:PROBED_TOKENS] for name, x in draft.states()[0].items()}]
    for session in sessions:
        states.append(draft.after(states[-1], draft.run(session, states[-1])))

    def predictions(state: State) -> np.ndarray:
        return _log_probabilities(draft.run(head, {"residual": state["residual"][::APART]})["logits"])

    exact = predictions(states[-1])
    found: dict[str, Damage] = {}
    total = sum(len(products(graph)) for graph in graphs)
    for at, graph in enumerate(graphs):
        for name, weights, changed in _in_few_bits(draft, graph, block):
            state = states[at]
            for session in (draft.session(changed), *sessions[at + 1 :]):
                state = draft.after(state, draft.run(session, state))
            divergence = float((np.exp(exact) * (exact - predictions(state))).sum(-1, dtype=np.float64).mean())
            found[name] = Damage(weights, max(divergence, 0.0))
            if progress is not None:
                progress(len(found), total)
    return found


def plan_of_bits(found: Mapping[str, Damage], bits: float) -> dict[str, int]:
    """Bits of every matrix, of `STEPS`, such that they are at most `bits` on average over all weights.

    Damage is the square of a small error, which every bit halves. Steps down that do least damage for what they save
    come first: a matrix's next one does more for less than the one before, so they come in its order.
    """
    total = sum(damage.weights for damage in found.values())
    plan, spent = dict.fromkeys(found, MANY), float(MANY * total)
    steps = [
        (found[name].divergence * (_part(few) - _part(many)) / (found[name].weights * (many - few)), -few, name)
        for name in found
        for many, few in itertools.pairwise(STEPS)
    ]
    for _, less, name in sorted(steps):
        if spent <= bits * total:
            break
        spent -= (plan[name] + less) * found[name].weights
        plan[name] = -less
    return plan


def _part(bits: int) -> float:
    """Of the damage in FEW bits, what is left in so many."""
    return 4.0 ** (FEW - bits)


def _in_few_bits(draft: Draft, graph: onnx.ModelProto, block: int) -> Iterator[tuple[str, int, onnx.ModelProto]]:
    """Name and weights of every matrix of a segment, and the segment with that one in few bits."""
    for name in products(graph):
        changed = onnx.ModelProto()
        changed.CopyFrom(graph)
        node = products(changed)[name]
        attributes = {a.name: a for a in node.attribute}
        tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
        codes, scales = (numpy_helper.to_array(tensors[x], str(draft.folder)) for x in node.input[1:3])
        k = attributes["K"].i
        matrix = QuantizedMatrix(codes, scales, MANY, attributes["block_size"].i, k).dequantize()
        few = quantize_matrix(matrix, FEW, block)
        parts = {"few.codes": few.codes, "few.scales": few.scales, "few.zeros": few.packed_zeros}
        changed.graph.initializer.extend(numpy_helper.from_array(x, part) for part, x in parts.items() if x is not None)
        del node.input[1:]
        node.input.extend(parts)
        attributes["bits"].i, attributes["block_size"].i = few.bits, few.block
        yield name, matrix.size, changed


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocab] of logits."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
