"""Graphs whose nodes are in no order, or that do not take and yield what the runtime feeds and reads."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.attacks.conftest import Attack, refused_of
from tests.attacks.graphs import (
    FLOATS,
    HEAD,
    NORM,
    SEGMENT,
    UNCERTAINTY,
    Model,
    before,
    constant,
    front,
    model,
    node,
    nodes,
    replace,
)


def renamed(found: Model, old: str, new: str) -> None:
    for entry in found.graph.node:
        for names in (entry.input, entry.output):
            for i, name in enumerate(names):
                names[i] = new if name == old else name
    for value in (*found.graph.input, *found.graph.output):
        value.name = new if value.name == old else value.name


def swapped(found: Model) -> None:
    """The first two nodes in the other order."""
    kept = list(found.graph.node)
    del found.graph.node[:]
    found.graph.node.extend([*reversed(kept[:2]), *kept[2:]])


def cycle(found: Model) -> None:
    entry = nodes(found, NORM)[0]
    front(found, node("Abs", entry.output[0], "round"))
    nodes(found, NORM)[0].input[0] = "round"


def declared(which: str, at: int, change) -> Attack:
    return lambda found: change(getattr(found.graph, which)[at].type.tensor_type)


ATTACKS: dict[str, tuple[str, Attack, str]] = {
    # Order, names, what goes in and out
    "used before defined": ("fp32", model(SEGMENT, swapped), "is used before it is defined"),
    "a cycle": ("fp32", model(HEAD, cycle), "is used before it is defined"),
    "its own input": ("fp32", model(HEAD, before(NORM, node("Abs", "evil"))), "'evil' is used before it is defined"),
    "defined twice": (
        "fp32",
        model(HEAD, lambda m: front(m, node("Abs", "residual", m.graph.node[0].output[0]))),
        "defined twice",
    ),
    "a constant defined twice": (
        "fp32",
        model(HEAD, lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        "defined twice",
    ),
    "a constant over an input": (
        "fp32",
        model(HEAD, constant(lambda t: setattr(t, "name", "residual"))),
        "'residual' is defined twice",
    ),
    "an input defined again": (
        "fp32",
        model(HEAD, lambda m: front(m, node("Abs", "residual", "residual"))),
        "defined twice",
    ),
    "a node for nobody": (
        "fp32",
        model(HEAD, lambda m: front(m, node("Abs", "residual", "idle"))),
        "nothing uses 'idle'",
    ),
    "a constant for nobody": (
        "fp32",
        model(HEAD, lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(9, np.float32), "idle"))),
        "nothing uses 'idle'",
    ),
    "a node without outputs": (
        "fp32",
        model(HEAD, lambda m: m.graph.node.append(node("Abs", "residual", ""))),
        "0 outputs",
    ),
    "an output without a name": (
        "fp32",
        model(HEAD, lambda m: m.graph.node.append(helper.make_node("Abs", ["residual"], [""]))),
        "has no name",
    ),
    "one input more": (
        "fp32",
        model(HEAD, lambda m: m.graph.input.append(helper.make_tensor_value_info("x", FLOATS, [1]))),
        "it takes",
    ),
    "one input twice": (
        "fp32",
        model(HEAD, lambda m: m.graph.input.append(m.graph.input[0])),
        "'residual' is defined twice",
    ),
    "one output twice": ("fp32", model(HEAD, lambda m: m.graph.output.append(m.graph.output[0])), "it yields"),
    "one output more": (
        "fp32",
        model(HEAD, lambda m: m.graph.output.append(helper.make_tensor_value_info("residual", FLOATS, ["rows", 64]))),
        "it yields",
    ),
    "no output": ("fp32", model(HEAD, lambda m: m.graph.ClearField("output")), "it yields"),
    "another output": ("fp32", model(HEAD, lambda m: renamed(m, "logits", "logits_out")), "it yields"),
    "another input": ("fp32", model(HEAD, lambda m: renamed(m, "residual", "state")), "it takes"),
    "an output that is an input": (
        "fp32",
        model(SEGMENT, lambda m: renamed(m, "residual", "residual_out")),
        "it takes",
    ),
    "an input of doubles": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: setattr(t, "elem_type", TensorProto.DOUBLE))),
        "is declared as",
    ),
    "an output of whole numbers": (
        "fp32",
        model(HEAD, declared("output", 0, lambda t: setattr(t, "elem_type", TensorProto.INT64))),
        "is declared as",
    ),
    "an input of 2^31 columns": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: setattr(t.shape.dim[1], "dim_value", 1 << 31))),
        "is declared as",
    ),
    "an input of -1 columns": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: setattr(t.shape.dim[1], "dim_value", -1))),
        "is declared as",
    ),
    "columns that are free": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: setattr(t.shape.dim[1], "dim_param", "columns"))),
        "free dimensions",
    ),
    "rows that are two": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: setattr(t.shape.dim[0], "dim_value", 2))),
        "free dimensions",
    ),
    "rows of another name in the output": (
        "fp32",
        model(HEAD, declared("output", 0, lambda t: setattr(t.shape.dim[0], "dim_param", "others"))),
        "is declared as",
    ),
    "an output of one dimension": (
        "fp32",
        model(HEAD, declared("output", 0, lambda t: t.shape.dim.pop())),
        "is declared as",
    ),
    "an input without a shape": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: t.ClearField("shape"))),
        "does not say what",
    ),
    "an input of a sequence": (
        "fp32",
        model(HEAD, lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent()),
        "no tensor",
    ),
    "a dimension that is nothing": (
        "fp32",
        model(HEAD, declared("input", 0, lambda t: t.shape.dim[0].ClearField("dim_param"))),
        "nothing, or two things",
    ),
    "logits of another width": (
        "fp32",
        model(HEAD, before("Identity", node("Slice", "VALUE a b c"), a=[0], b=[500], c=[1])),
        "logits is computed as",
    ),
    "logits of the residual": (
        "fp32",
        model(UNCERTAINTY, lambda m: replace(m, nodes(m, "Identity")[0], 0, "logits")),
        "entropy is computed as|nothing uses",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_graph_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    refused_of(request, *ATTACKS[name])
