"""The graphs behind the last layer: the head, and what a policy may ask of its logits."""

from __future__ import annotations

import numpy as np

from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.graphs.builder import Graph
from kvq.exporter.graphs.layers import norm
from kvq.exporter.graphs.products import Products
from kvq.exporter.weights.file import WeightFile


def head_graph(checkpoint: Checkpoint, products: Products, file: WeightFile) -> Graph:
    """Final norm and language-model head: residual [rows, hidden] -> logits [rows, vocab]."""
    graph, shape = Graph("head", file), checkpoint.architecture
    residual = graph.input("residual", "rows", shape.hidden)
    logits = products.head(graph, norm(graph, checkpoint, checkpoint.model.norm, residual))
    graph.output(logits, "logits", "rows", shape.vocab)
    return graph


def uncertainty_graph(vocab: int, file: WeightFile) -> Graph:
    """Entropy in nats and largest probability of softmax(logits), per row.

    With z = logits - max: entropy = log(sum e^z) - sum(z e^z) / sum e^z, largest = 1 / sum e^z.
    """
    graph = Graph("uncertainty", file)
    logits = graph.input("logits", "rows", vocab)
    last = graph.constant([-1])
    z = graph.op("Sub", logits, graph.op("ReduceMax", logits, last, keepdims=1))
    exponential = graph.op("Exp", z)
    total = graph.op("ReduceSum", exponential, last, keepdims=0)
    weighted = graph.op("ReduceSum", graph.op("Mul", exponential, z), last, keepdims=0)
    entropy = graph.op("Sub", graph.op("Log", total), graph.op("Div", weighted, total))
    graph.output(entropy, "entropy", "rows")
    graph.output(graph.op("Div", graph.constant(1.0, np.float32), total), "confidence", "rows")
    return graph
