"""Graphs that every reader understands alike, of operators that do what ours never do: memory, work, whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.attacks.conftest import Attack, refused_of
from tests.attacks.graphs import (
    FIRST,
    FLOATS,
    HEAD,
    NBITS,
    NORM,
    ONE,
    SEGMENT,
    UNCERTAINTY,
    Model,
    attribute,
    before,
    front,
    model,
    node,
    nodes,
    numbers,
    replace,
)


def killer(found: Model) -> None:
    """INT64_MIN / -1, which a processor answers with a signal: as it was found."""
    extra = [
        node("Cast", "residual", "w", to=TensorProto.INT64),
        node("Mul", "w zero", "none"),
        node("Add", "none least", "minimum"),
        node("Div", "minimum minus", "overflow"),
        node("Cast", "overflow", "back", to=FLOATS),
    ]
    for name, value in (("zero", 0), ("least", -(1 << 63)), ("minus", -1)):
        found.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    nodes(found, NORM)[0].input[0] = "back"
    front(found, *extra)


def doubled(times: int) -> Attack:
    """The residual joined with itself, over and over."""
    extra, last = [], "VALUE"
    for i in range(times):
        extra.append(node("Concat", f"{last} {last}", f"twice_{i}", axis=1))
        last = f"twice_{i}"
    return model(HEAD, before(NORM, *extra, result=last))


def chain(length: int) -> Attack:
    """So many nodes that do nothing."""
    extra = [node("Abs", "VALUE" if i == 0 else f"same_{i - 1}", f"same_{i}") for i in range(length)]
    return model(HEAD, before(NORM, *extra, result=f"same_{length - 1}"))


def many(found: Model) -> None:
    """A hundred values as large as one may be."""
    extra = [node("Concat", " ".join(["VALUE"] * 8), "x0", axis=1)]
    extra += [node("Abs", f"x{i}", f"x{i + 1}") for i in range(100)]
    extra.append(node("Slice", "x100 a b c", "small"))
    before("Exp", *extra, result="small", a=[0], b=[512], c=[1])(found)


def laborious(found: Model) -> None:
    """Two matrices, multiplied with more often than they are worth."""
    wide = np.zeros((64, 512), np.float32)
    found.graph.initializer.append(numpy_helper.from_array(wide, "wide"))
    found.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(wide.T), "narrow"))
    extra, last = [], "VALUE"
    for i in range(60):
        extra += [node("MatMul", f"{last} wide", f"m_{i}"), node("MatMul", f"m_{i} narrow", f"n_{i}")]
        last = f"n_{i}"
    before(NORM, *extra, result=last)(found)


ATTACKS: dict[str, tuple[str, Attack, str]] = {
    # Operators that are not ours, or not there
    "Elu": ("fp32", model(HEAD, before(NORM, node("Elu", "VALUE"))), "operator Elu is not one the exporter writes"),
    "Loop": ("fp32", model(HEAD, lambda m: front(m, node("Loop", "n c", "x"))), "operator Loop is not one"),
    "If": ("fp32", model(HEAD, lambda m: front(m, node("If", "c", "x"))), "operator If is not one"),
    "Expand": ("fp32", model(HEAD, before(NORM, node("Expand", "VALUE n"), n=ONE)), "operator Expand is not one"),
    "Tile": ("fp32", model(HEAD, before(NORM, node("Tile", "VALUE n"), n=ONE)), "operator Tile is not one"),
    "Range": ("fp32", model(HEAD, lambda m: front(m, node("Range", "a b c", "x"))), "operator Range is not one"),
    "ConstantOfShape": (
        "fp32",
        model(HEAD, lambda m: front(m, node("ConstantOfShape", "n", "x"))),
        "ConstantOfShape is not",
    ),
    "a sampler": (
        "fp32",
        model(HEAD, lambda m: front(m, node("BeamSearch", "a", "x", "com.microsoft"))),
        "operator com.microsoft::BeamSearch is not one",
    ),
    "MatMulNBits of ai.onnx": (
        "int4",
        model(SEGMENT, lambda m: setattr(nodes(m, NBITS)[0], "domain", "")),
        "operator MatMulNBits is not one",
    ),
    "Add of com.microsoft": (
        "fp32",
        model(HEAD, before(NORM, node("Add", "VALUE VALUE", domain="com.microsoft"))),
        "operator com.microsoft::Add is not one",
    ),
    "AddNorm in the head": (
        "fp32",
        model(
            HEAD,
            lambda m: (
                m.opset_import.append(helper.make_opsetid("kvq", 1)),
                front(m, node("SwiGLU", "residual", "x", "kvq")),
            ),
        ),
        "it is of the decoder alone",
    ),
    "an operator without a name": (
        "fp32",
        model(HEAD, lambda m: nodes(m, NORM)[0].ClearField("op_type")),
        "operator  is not",
    ),
    # Whole numbers are not calculated with
    "INT64_MIN divided by -1": ("fp32", model(HEAD, killer), "from type 1 to type 7"),
    "ids divided": ("fp32", model(FIRST, before("Cast", node("Div", "VALUE n"), n=ONE)), "operator Div .*not float32"),
    "positions added to": (
        "fp32",
        model(FIRST, before("Cast", node("Add", "VALUE n"), n=ONE)),
        "operator Add .*not float32",
    ),
    "the larger of two positions": ("fp32", model(FIRST, before("Cast", node("Max", "VALUE n"), n=ONE)), "not float32"),
    "positions as they are": ("fp32", model(FIRST, before("Cast", node("Identity", "VALUE"))), "not float32"),
    "positions reshaped": ("fp32", model(FIRST, before("Cast", node("Reshape", "VALUE n"), n=ONE)), "not float32"),
    "cast to half precision": (
        "fp32",
        model(FIRST, attribute("Cast", "to", TensorProto.FLOAT16)),
        "from type 7 to type 10",
    ),
    "cast to text": ("fp32", model(FIRST, attribute("Cast", "to", TensorProto.STRING)), "from type 7 to type 8"),
    "cast of a float": ("fp32", model(HEAD, before(NORM, node("Cast", "VALUE", to=FLOATS))), "from type 1 to type 1"),
    # Memory
    "padded to 8 GB": (
        "fp32",
        model(HEAD, before(NORM, node("Pad", "VALUE n"), n=np.array([0, 0, 0, 1 << 31]))),
        "Pad .*larger than any value",
    ),
    "padded by tokens": (
        "fp32",
        model(HEAD, before(NORM, node("Pad", "VALUE n"), n=np.array([0, 0, 1 << 31, 0]))),
        "it cuts or joins tokens",
    ),
    "padded by -1": ("fp32", model(HEAD, before(NORM, node("Pad", "VALUE n"), n=np.array([0, 0, 0, -1]))), "Pad .*by"),
    "joined 40 times": ("fp32", doubled(40), "Concat .*larger than any value"),
    "joined 8 times": ("fp32", doubled(8), "larger than any value"),
    "joined with itself 60 times at once": (
        "fp32",
        model(
            HEAD,
            before(
                NORM,
                *(
                    node("Concat", " ".join(["VALUE" if i == 0 else f"c{i - 1}"] * 60), f"c{i}", axis=1)
                    for i in range(3)
                ),
                result="c2",
            ),
        ),
        "larger than any value",
    ),
    "joined with itself a hundred times": (
        "fp32",
        model(HEAD, before(NORM, node("Concat", " ".join(["VALUE"] * 100), axis=1))),
        "more than 64 of input",
    ),
    "tokens times tokens": (
        "fp32",
        model(HEAD, before(NORM, node("Transpose", "VALUE", "t", perm=[1, 0]), node("MatMul", "VALUE t"))),
        "MatMul .*not rows times a matrix",
    ),
    "tokens beside tokens": (
        "fp32",
        model(
            UNCERTAINTY,
            before(
                "Exp",
                node("Reshape", "VALUE a", "rows"),
                node("Transpose", "rows", "columns", perm=[1, 0]),
                node("Reshape", "VALUE b", "x"),
                node("Add", "x columns"),
                a=np.array([-1, 512]),
                b=np.array([512, -1]),
            ),
        ),
        "operator|square",
    ),
    "a thousand nodes": ("fp32", chain(1000), "it has 1.* operators"),
    "a hundred values of all that is allowed": ("fp32", model(UNCERTAINTY, many), "its values are larger"),
    "work beyond its weights": ("fp32", model(HEAD, laborious), "it computes more than its weights are worth"),
    # Shapes
    "reshaped to 0": (
        "fp32",
        model(SEGMENT, numbers("Reshape", 1, [0, -1, 0])),
        "Reshape .*a shape of .* for .tokens, 96",
    ),
    "reshaped to two unknowns": ("fp32", model(SEGMENT, numbers("Reshape", 1, [-1, -1])), "Reshape .*a shape of"),
    "reshaped to -2": ("fp32", model(SEGMENT, numbers("Reshape", 1, [-2, 8])), "Reshape .*a shape of"),
    "reshaped to more": ("fp32", model(SEGMENT, numbers("Reshape", 1, [-1, 12, 1 << 40])), "does not have the shape"),
    "reshaped to one token": ("fp32", model(SEGMENT, numbers("Reshape", 1, [1, 1, 96])), "does not have the shape"),
    "reshaped by what is computed": (
        "fp32",
        model(SEGMENT, lambda m: replace(m, nodes(m, "Reshape")[0], 1, "residual")),
        "not a constant of the graph",
    ),
    "reshaped to five dimensions": (
        "fp32",
        model(SEGMENT, numbers("Reshape", 1, [1, 1, 1, 1, -1])),
        "Reshape .*a shape of",
    ),
    "a shape of a thousand numbers": (
        "fp32",
        model(SEGMENT, numbers("Reshape", 1, [1] * 1000)),
        "a list of whole numbers that is too long",
    ),
    "split into less": ("fp32", model(SEGMENT, numbers("Split", 1, [8, 8])), "Split .*in parts of"),
    "split into more": ("fp32", model(SEGMENT, numbers("Split", 1, [1 << 20, 1 << 20])), "Split .*in parts of"),
    "split below nothing": ("fp32", model(SEGMENT, numbers("Split", 1, [-64, 408])), "Split .*in parts of"),
    "split along tokens": ("fp32", model(SEGMENT, attribute("Split", "axis", 0)), "it cuts or joins tokens"),
    "split along axis 9": ("fp32", model(SEGMENT, attribute("Split", "axis", 9)), "axis 9 of 2"),
    "split along axis -9": ("fp32", model(SEGMENT, attribute("Split", "axis", -9)), "axis -9 of 2"),
    "transposed twice the same": (
        "fp32",
        model(SEGMENT, attribute("Transpose", "perm", [0, 0, 1])),
        "Transpose .*axes",
    ),
    "transposed beyond": ("fp32", model(SEGMENT, attribute("Transpose", "perm", [0, 1, 7])), "Transpose .*axes"),
    "transposed otherwise": ("fp32", model(SEGMENT, attribute("Transpose", "perm", [2, 1, 0])), "operator"),
    "sliced beyond": (
        "int4",
        model(FIRST, before("Identity", node("Slice", "VALUE a b c"), a=[0], b=[1 << 40], c=[1])),
        "Slice .*0:1099511627776 of",
    ),
    "sliced before": (
        "int4",
        model(FIRST, before("Identity", node("Slice", "VALUE a b c"), a=[-9], b=[8], c=[1])),
        "Slice .*-9:8",
    ),
    "sliced along tokens": (
        "int4",
        model(FIRST, before("Identity", node("Slice", "VALUE a b c"), a=[0], b=[1], c=[0])),
        "cuts or joins tokens",
    ),
    "sliced with steps": (
        "int4",
        model(FIRST, before("Identity", node("Slice", "VALUE a b c d"), a=[0], b=[8], c=[1], d=[0])),
        "Slice .*5 inputs",
    ),
    "reduced along tokens": (
        "fp32",
        model(UNCERTAINTY, numbers("ReduceMax", 1, [0])),
        "ReduceMax .*cuts or joins tokens",
    ),
    "reduced along two axes": ("fp32", model(UNCERTAINTY, numbers("ReduceMax", 1, [0, 1])), "2 axes"),
    "reduced along no axis": ("fp32", model(UNCERTAINTY, lambda m: nodes(m, "ReduceMax")[0].input.pop()), "1 inputs"),
    "reduced and kept twice": ("fp32", model(UNCERTAINTY, attribute("ReduceMax", "keepdims", 2)), "keepdims 2"),
    "reduced and not kept": (
        "fp32",
        model(UNCERTAINTY, attribute("ReduceMax", "keepdims", 0)),
        "operator Sub .*shapes",
    ),
    "an attribute more": ("fp32", model(SEGMENT, attribute("Split", "num_outputs", 2)), "Split .*attributes"),
    "an attribute less": ("fp32", model(SEGMENT, attribute("Split", "axis", None)), "Split .*attributes"),
    "an axis that is a float": ("fp32", model(SEGMENT, attribute("Split", "axis", -1.0)), "Split .*attributes"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_graph_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    refused_of(request, *ATTACKS[name])
