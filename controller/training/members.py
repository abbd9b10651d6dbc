"""Several networks as one: a controller whose outputs are the mean of its members'.

Members are trained apart, on other tokens or from another start. What they err by differs, so their mean errs less than
any of them. Side by side they are one network of the same form, as wide as all of them: the runtime need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from kvq.controller.training.network import Controller, folded_norms
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.errors import CalibrationError

LAYERS = 3  # of a `Controller`


def mean_of(first: Controller, second: Controller, share: float) -> Controller:
    """One network that gives `share` of what the first gives and the rest of what the second does.

    Args:
        first, second: without token tables, of the same inputs and classes; any widths.
        share: between 0 and 1; the number of the first one's members by that of both, so that all count alike.
    """
    one, other = ([_dense(net, i) for i in range(LAYERS)] for net in (first, second))
    widths = [len(weight) for weight, _ in (one[0], other[0])]
    net = Controller(one[0][0].shape[1], sum(widths), len(one[-1][0]))
    rest = 1 - share
    weights = [
        torch.cat([one[0][0], other[0][0]]),
        torch.block_diag(one[1][0], other[1][0]),
        torch.cat([share * one[2][0], rest * other[2][0]], 1),
    ]
    biases = [torch.cat([one[layer][1], other[layer][1]]) for layer in (0, 1)]
    return _with(net, weights, [*biases, share * one[2][1] + rest * other[2][1]])


def _with(net: Controller, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> Controller:
    """The network with these weights and biases, by layer."""
    parts = [(f"layers.{i}.{name}", found[i]) for name, found in (("weight", weights), ("bias", biases))
             for i in range(LAYERS)]  # fmt: skip
    net.load_state_dict(net.state_dict() | {name: tensor.float() for name, tensor in parts})
    return net.eval()


def _dense(net: Controller, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer, float64; the first takes features before normalisation."""
    state = net.state_dict()
    weight, bias = (state[f"layers.{layer}.{part}"].double() for part in ("weight", "bias"))
    if layer:
        return weight, bias
    return weight * net.scale, bias - weight @ (net.mean * net.scale).double()


def read_onnx(file: Path, shape: Architecture, feature_set: str) -> Controller:
    """The network of a graph that `network.write_onnx` has written, its normalisation in its first layer.

    Raises:
        CalibrationError: the graph is of another form, as one with a token table is.
    """
    tensors = {each.name: numpy_helper.to_array(each) for each in onnx.load(str(file)).graph.initializer}
    names = [f"{part}_{i}" for i in range(LAYERS) for part in ("weight", "bias")]
    if "table" in tensors or any(name not in tensors for name in names):
        raise CalibrationError(f"{file.name} is no controller that can be added to; train one without --add")
    weights, biases = ([tensors[f"{part}_{i}"] for i in range(LAYERS)] for part in ("weight", "bias"))
    net = Controller(weights[0].shape[1], len(weights[0]), len(weights[-1]))
    biases[0] = biases[0] + weights[0].astype(np.float64) @ folded_norms(shape, feature_set, weights[0].shape[1])
    return _with(net, *([torch.from_numpy(np.array(each)) for each in found] for found in (weights, biases)))


class Earlier(NamedTuple):
    """The network that a bundle has, for one to be added.

    Attributes:
        net: with `members` in it.
        members: networks that were trained apart.
        samples: tokens they were trained on, all together.
    """

    net: Controller
    members: int
    samples: int

    def with_another(self, net: Controller, samples: int) -> Earlier:
        """The mean of all members and a new one, which was trained on so many tokens."""
        mean = mean_of(self.net, net, self.members / (self.members + 1))
        return Earlier(mean, self.members + 1, self.samples + samples)


def earlier(bundle: Bundle, objective: str, feature_set: str, classes: Sequence[tuple[int, int]]) -> Earlier:
    """A bundle's controller of an objective.

    Raises:
        CalibrationError: the bundle has none, one of other features or classes, or one that cannot be added to.
    """
    entry = bundle.manifest.controllers.get(objective)
    if entry is None:
        raise CalibrationError(f"{bundle.path} has no {objective} controller to add to; train one without --add")
    if entry.get("set") != feature_set or [list(pair) for pair in entry["classes"]] != [list(pair) for pair in classes]:
        raise CalibrationError(
            f"the {objective} controller of {bundle.path} has other features or precisions; train one without --add"
        )
    counts = [entry.get(name) for name in ("members", "samples")]
    members, samples = (count if isinstance(count, int) and count > 0 else 1 for count in counts)
    return Earlier(read_onnx(bundle.path / entry["file"], bundle.manifest.architecture, feature_set), members, samples)
