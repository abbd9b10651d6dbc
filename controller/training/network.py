"""The controllers' networks in torch, and the same as ONNX for the runtime.

Both take named inputs, so that the graph itself says which features a bundle's controller wants,
and hold their normalisation inside: the runtime hands over what it has.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from kvq.controller.training.samples import Samples
from kvq.exporter.graphs.builder import Graph
from kvq.runtime.bundle.manifest import Architecture

PAPER_INPUTS = ("entropy", "rarity", "attention_variance", "confidence")
EXTENDED_INPUTS = ("ids", "positions", "residual", "keys", "values")
SETS = {"paper": PAPER_INPUTS, "extended": EXTENDED_INPUTS}
# Attention variance spans five orders of magnitude; its logarithm is what is normalised.
VARIANCE_FLOOR = 1e-6
NORM_FLOOR = 1e-12  # of mean squares, before their logarithm


class Controller(nn.Module):
    """Features -> one number per class.

    Args:
        features: normalised inputs beside the token table.
        hidden: width of both hidden layers.
        classes: outputs.
        table: rows of a table of learned numbers per token id, and how many of them; None has none.
        dropout: share of inputs and hidden units that are left out while it is trained.
    """

    def __init__(
        self, features: int, hidden: int, classes: int, table: tuple[int, int] | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.table = nn.Embedding(*table) if table else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.01)
        width = features + (table[1] if table else 0)
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)])
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def normalise(self, features: np.ndarray) -> None:
        """Take mean and standard deviation from training features [tokens, features]."""
        mean = features.mean(0, dtype=np.float64)
        # A feature that hardly varies must not be blown up: rounding would be all that is left of it.
        spread = features.std(0, dtype=np.float64) + 1e-3 * np.abs(mean) + 1e-6
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.copy_(torch.from_numpy(1 / spread))

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """float32 [tokens, classes] of features [tokens, features] and ids int64 [tokens]."""
        x = (features - self.mean) * self.scale
        if self.table is not None:
            x = torch.cat([x, self.table(ids)], 1)
        x = self.dropout(x)
        first, second = self.layers[:-1]
        x = torch.relu(second(self.dropout(torch.relu(first(x)))))
        return self.last(x)


def inputs_of(feature_set: str, net: Controller) -> tuple[str, ...]:
    """What a network of a feature set reads: names of `TokenFeatures`."""
    return SETS[feature_set] if net.table is not None or feature_set == "paper" else SETS[feature_set][1:]


class _Inline:
    """Keeps tensors inside the graph: a controller is one small file."""

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        return numpy_helper.from_array(np.ascontiguousarray(array), name)


def features_of(samples: Samples, feature_set: str) -> np.ndarray:
    """Inputs of a network before normalisation, float32 [tokens, features]; `write_onnx` computes the same."""
    if feature_set == "paper":
        features = samples.paper.copy()
        features[:, 2] = np.log(features[:, 2] + VARIANCE_FLOOR)
        return features
    place = np.log(samples.positions[:, None] + 1.0)
    return np.concatenate([place, samples.norms, samples.residual], axis=1, dtype=np.float32)


def _paper_columns(graph: Graph) -> list[str]:
    """Inputs of the paper's network in a graph, float32 [tokens, 1] each."""
    column, columns = graph.constant([-1, 1]), []
    for feature in PAPER_INPUTS:
        x = graph.op("Reshape", graph.input(feature, "tokens"), column)
        if feature == "attention_variance":
            x = graph.op("Log", graph.op("Add", x, graph.constant(VARIANCE_FLOOR, np.float32)))
        columns.append(x)
    return columns


def _columns(graph: Graph, shape: Architecture) -> list[str]:
    """Inputs of the other networks in a graph: place, norms and residual, float32 [tokens, ...] each.

    The log of a mean is that of the sum less a constant: the norms are `folded_norms` too large, which goes into the
    normalisation.
    """
    column = graph.constant([-1, 1])
    positions = graph.input("positions", "tokens", dtype=TensorProto.INT64)
    residual = graph.input("residual", "tokens", shape.hidden)
    place = graph.op("Reshape", graph.op("Cast", positions, to=TensorProto.FLOAT), column)
    logs = graph.op("Log", graph.op("Add", place, graph.constant(1.0, np.float32)))
    sides = [graph.input(side, shape.layers, shape.kv_heads, "tokens", shape.head_dim) for side in ("keys", "values")]
    squares = graph.op("ReduceSumSquare", graph.op("Concat", *sides, axis=0), graph.constant([-1]), keepdims=0)
    floored = graph.op("Add", squares, graph.constant(NORM_FLOOR * shape.head_dim, np.float32))
    rows = graph.op("Reshape", graph.op("Log", floored), graph.constant([2 * shape.layers * shape.kv_heads, -1]))
    return [logs, graph.op("Transpose", rows, perm=[1, 0]), residual]


def folded_norms(shape: Architecture, feature_set: str, features: int) -> np.ndarray:
    """What a graph's inputs are above the features that a network is trained on, float32 [features]."""
    above = np.zeros(features, np.float32)
    if feature_set != "paper":
        above[1 : 1 + 2 * shape.layers * shape.kv_heads] = np.log(shape.head_dim)
    return above


def write_onnx(
    net: Controller, feature_set: str, shape: Architecture, prices: np.ndarray | None, folder: Path, name: str
) -> str:
    """Write `<name>.onnx`: named inputs -> scores float32 [tokens, classes]; returns the file name.

    Args:
        net: the trained network.
        feature_set: a name of `SETS`.
        shape: of the model.
        prices: float32 [classes] in nats, what each class costs when no budget is given: the network's
            outputs are logarithms of damage, and scores are minus damage minus price. None: the
            outputs are logits, and scores are log-probabilities.
        folder: where to.
        name: without suffix.
    """
    graph = Graph(name, _Inline())  # type: ignore[arg-type]
    state = {key: value.detach().cpu().numpy().copy() for key, value in net.state_dict().items()}
    columns = _paper_columns(graph) if feature_set == "paper" else _columns(graph, shape)
    x = graph.op("Concat", *columns, axis=1)
    if net.table is not None:
        ids = graph.input("ids", "tokens", dtype=TensorProto.INT64)
        x = graph.op("Concat", x, graph.op("Gather", graph.weight("table", state["table.weight"]), ids), axis=1)
    state["mean"] += folded_norms(shape, feature_set, len(state["mean"]))
    # (x - mean) * scale is part of the first layer: fewer nodes, and a decode step runs each of them.
    first, inputs = state["layers.0.weight"].astype(np.float64), len(state["mean"])
    state["layers.0.bias"] = state["layers.0.bias"] - first[:, :inputs] @ (state["mean"] * state["scale"]).astype(float)
    first[:, :inputs] *= state["scale"]
    state["layers.0.weight"] = first
    for i in range(len(net.layers)):
        weight, bias = (state[f"layers.{i}.{part}"].astype(np.float32) for part in ("weight", "bias"))
        x = graph.op("Gemm", x, graph.weight(f"weight_{i}", weight), graph.weight(f"bias_{i}", bias), transB=1)
        if i + 1 < len(net.layers):
            x = graph.op("Relu", x)
    if prices is None:
        x = graph.op("LogSoftmax", x, axis=1)
    else:
        x = graph.op("Sub", graph.weight("minus_prices", -prices.astype(np.float32)[None]), graph.op("Exp", x))
    graph.output(x, "scores", "tokens", net.last.out_features)
    file = graph.save(folder)
    onnx.checker.check_model(str(folder / file))
    return file
