"""Products, norms, tables, angles and attention whose parts do not fit each other, or not the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import numpy_helper

from tests.attacks.conftest import Attack, refused_of
from tests.attacks.graphs import (
    DECODER,
    FIRST,
    GEMM,
    HEAD,
    NBITS,
    NORM,
    ROTARY,
    SEGMENT,
    Model,
    attribute,
    model,
    node,
    nodes,
    numbers,
    replace,
)


def gain_of(size: int) -> Attack:
    def attack(found: Model) -> None:
        found.graph.initializer.append(numpy_helper.from_array(np.ones(size, np.float32), "gain"))
        replace(found, nodes(found, NORM)[0], 1, "gain")

    return attack


def extra_input(kind: str, *names: str) -> Attack:
    return lambda found: nodes(found, kind)[0].input.extend(names)


def zero_points(*shape: int, dtype=np.uint8) -> Attack:
    def attack(found: Model) -> None:
        found.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), "zero_points"))
        replace(found, nodes(found, NBITS)[0], 3, "zero_points")

    return attack


def index_by_position(found: Model) -> None:
    entry = nodes(found, "Gather")[0]
    entry.input[1] = "positions"


def offsets(*shape: int, dtype=np.float32) -> Attack:
    """Other offsets for the first product, of a matrix [64, 64] whose offsets are [64, 2]."""

    def attack(found: Model) -> None:
        found.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), "others"))
        replace(found, nodes(found, GEMM)[0], 1, "others")

    return attack


def summand(*shape: int, dtype=np.float32) -> Attack:
    """A constant in the place of the product, [tokens, 192], that the second product of sums is added to."""

    def attack(found: Model) -> None:
        found.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), "others"))
        nodes(found, GEMM)[1].input[2] = "others"

    return attack


def sums(found: Model, at: int, shape: list[int]) -> None:
    """Another shape for the values that are summed first."""
    entry = next(n for n in found.graph.node if nodes(found, "ReduceSum")[0].input[0] in n.output)
    found.graph.initializer.append(numpy_helper.from_array(np.array(shape), "others"))
    replace(found, entry, at, "others")


def added(name: Callable[[Model], str]) -> Attack:
    """Another value in the place of the product that the first product of sums is added to."""

    def attack(found: Model) -> None:
        nodes(found, GEMM)[0].input[2] = name(found)

    return attack


def one_column(found: Model) -> str:
    """Sums of whole rows, [tokens, 1], made in front of the first product of sums."""
    entry = nodes(found, GEMM)[0]
    found.graph.initializer.append(numpy_helper.from_array(np.array([1]), "last"))
    made = node("ReduceSum", "residual last", "column", keepdims=1)
    kept = list(found.graph.node)
    at = kept.index(entry)
    del found.graph.node[:]
    found.graph.node.extend([*kept[:at], made, *kept[at:]])
    return "column"


ATTACKS: dict[str, tuple[str, Attack, str]] = {
    # Norms and activations
    "a gain of another size": ("fp32", model(HEAD, gain_of(63)), f"{NORM} .*a gain of another shape"),
    "a gain of one": ("fp32", model(HEAD, gain_of(1)), "a gain of another shape"),
    "epsilon not a number": (
        "fp32",
        model(HEAD, attribute(NORM, "epsilon", float("nan"))),
        "attribute 'epsilon' is nan",
    ),
    "epsilon below nothing": ("fp32", model(HEAD, attribute(NORM, "epsilon", -1.0)), "an epsilon below 0"),
    "a norm along tokens": ("fp32", model(HEAD, attribute(NORM, "axis", 0)), f"{NORM} .*axis 0"),
    "a norm in half precision": ("fp32", model(HEAD, attribute(NORM, "stash_type", 10)), "stash_type 10"),
    "an activation without end": (
        "fp32",
        model(SEGMENT, attribute("QuickGelu", "alpha", float("inf"))),
        "attribute 'alpha' is inf",
    ),
    # Products
    "Gemm not across": ("fp32", model(HEAD, attribute(GEMM, "transB", 0)), "Gemm .*lies across"),
    "Gemm with rows across": ("fp32", model(HEAD, attribute(GEMM, "transA", 1)), "Gemm .*attributes"),
    "Gemm of one value": ("fp32", model(HEAD, lambda m: nodes(m, GEMM)[0].input.pop()), "Gemm .*1 inputs"),
    "Gemm with a bias of another size": (
        "fp32",
        model(HEAD, lambda m: nodes(m, GEMM)[0].input.append(nodes(m, NORM)[0].input[1])),
        "its biases",
    ),
    "Gemm with values for weights": (
        "fp32",
        model(HEAD, lambda m: replace(m, nodes(m, GEMM)[0], 1, nodes(m, NORM)[0].output[0])),
        "lies across",
    ),
    "bits 3": ("int4", model(SEGMENT, attribute(NBITS, "bits", 3)), "3 bits"),
    "bits 2": ("int4", model(SEGMENT, attribute(NBITS, "bits", 2)), "2 bits"),
    "bits 64": ("int4", model(SEGMENT, attribute(NBITS, "bits", 64)), "64 bits"),
    "bits 8 for 4": ("int4", model(SEGMENT, attribute(NBITS, "bits", 8)), "its codes are no constant of the shape"),
    "blocks of 7": ("int4", model(SEGMENT, attribute(NBITS, "block_size", 7)), "blocks of 7"),
    "blocks of 0": ("int4", model(SEGMENT, attribute(NBITS, "block_size", 0)), "blocks of 0"),
    "blocks of 512": ("int4", model(SEGMENT, attribute(NBITS, "block_size", 512)), "blocks of 512"),
    "blocks of 64 for 32": ("int4", model(SEGMENT, attribute(NBITS, "block_size", 64)), "its codes"),
    "K of 0": ("int4", model(SEGMENT, attribute(NBITS, "K", 0)), "K 0"),
    "K of -64": ("int4", model(SEGMENT, attribute(NBITS, "K", -64)), "K -64"),
    "K of 2^40": ("int4", model(SEGMENT, attribute(NBITS, "K", 1 << 40)), "its codes"),
    "K one more": ("int4", model(SEGMENT, attribute(NBITS, "K", 65)), "its codes|values of another shape"),
    "K one less": ("int4", model(SEGMENT, attribute(NBITS, "K", 63)), "values of another shape"),
    "N of 2^40": ("int4", model(SEGMENT, attribute(NBITS, "N", 1 << 40)), "its codes"),
    "N one more": ("int4", model(SEGMENT, attribute(NBITS, "N", 65)), "its codes"),
    "N of 0": ("int4", model(SEGMENT, attribute(NBITS, "N", 0)), "N 0"),
    "accuracy 9": ("int4", model(SEGMENT, attribute(NBITS, "accuracy_level", 9)), "accuracy level 9"),
    "no accuracy": ("int4", model(SEGMENT, attribute(NBITS, "accuracy_level", None)), "MatMulNBits .*attributes"),
    "K as a float": ("int4", model(SEGMENT, attribute(NBITS, "K", 64.0)), "MatMulNBits .*attributes"),
    "scales for codes": (
        "int4",
        model(SEGMENT, lambda m: replace(m, nodes(m, NBITS)[0], 1, nodes(m, NBITS)[0].input[2])),
        "its codes",
    ),
    "values for scales": (
        "int4",
        model(SEGMENT, lambda m: replace(m, nodes(m, NBITS)[0], 2, "residual")),
        "its scales",
    ),
    "zero points of another size": ("int4", model(SEGMENT, zero_points(3, 3)), "its zero points are no constant"),
    "zero points of floats": ("int4", model(SEGMENT, zero_points(64, 1, dtype=np.float32)), "its zero points"),
    "five inputs": ("int4", model(SEGMENT, extra_input(NBITS, "residual")), "MatMulNBits .*5 inputs"),
    "an input left out": ("int4", model(SEGMENT, extra_input(NBITS, "")), "'' is used before it is defined"),
    # Products of sums beside those of quantized matrices
    "offsets of more blocks": ("minima", model(SEGMENT, offsets(64, 3)), "Gemm .*2 columns, weights for 3"),
    "offsets of fewer blocks": ("minima", model(SEGMENT, offsets(64, 1)), "Gemm .*2 columns, weights for 1"),
    "offsets of more rows": ("minima", model(SEGMENT, offsets(65, 2)), "Gemm .*its biases are no constant .*65"),
    "offsets of fewer rows": ("minima", model(SEGMENT, offsets(1, 2)), "Gemm .*its biases are no constant .*1,"),
    "offsets of a list": ("minima", model(SEGMENT, offsets(128)), "Gemm .*lies across"),
    "offsets of blocks of blocks": ("minima", model(SEGMENT, offsets(64, 2, 1)), "Gemm .*lies across"),
    "offsets of whole numbers": ("minima", model(SEGMENT, offsets(64, 2, dtype=np.uint8)), "Gemm .*not float32"),
    "offsets of values": (
        "minima",
        model(SEGMENT, lambda m: replace(m, nodes(m, GEMM)[0], 1, "residual")),
        "Gemm .*lies across",
    ),
    "offsets turned": ("minima", model(SEGMENT, attribute(GEMM, "transB", 0)), "Gemm .*lies across"),
    "a product times 2": ("minima", model(SEGMENT, attribute(GEMM, "beta", 2.0)), "Gemm .*attributes"),
    "sums times 2": ("minima", model(SEGMENT, attribute(GEMM, "alpha", 2.0)), "Gemm .*attributes"),
    "four inputs": ("minima", model(SEGMENT, extra_input(GEMM, "residual")), "Gemm .*4 inputs"),
    "a product of another matrix": (
        "minima",
        model(SEGMENT, lambda m: replace(m, nodes(m, GEMM)[1], 2, nodes(m, NBITS)[0].output[0])),
        "Gemm .*its biases are no constant",
    ),
    "a product of a later matrix": (
        "minima",
        model(SEGMENT, added(lambda m: nodes(m, NBITS)[1].output[0])),
        "is used before it is defined",
    ),
    "sums added to themselves": (
        "minima",
        model(SEGMENT, added(lambda m: nodes(m, GEMM)[0].input[0])),
        "Gemm .*its biases are no constant",
    ),
    "a column added": ("minima", model(SEGMENT, added(one_column)), "Gemm .*its biases are no constant"),
    "blocks added": (
        "minima",
        model(SEGMENT, added(lambda m: nodes(m, "ReduceSum")[0].input[0])),
        "Gemm .*its biases are no constant",
    ),
    "a row of a constant added": ("minima", model(SEGMENT, summand(1, 192)), "Gemm .*its biases are no constant"),
    "rows of a constant added": ("minima", model(SEGMENT, summand(5, 192)), "Gemm .*its biases are no constant"),
    "a number added": ("minima", model(SEGMENT, summand()), "Gemm .*its biases are no constant"),
    "whole numbers added": ("minima", model(SEGMENT, summand(192, dtype=np.int64)), "Gemm .*not float32|too long"),
    "sums of half blocks": (
        "minima",
        model(SEGMENT, lambda m: sums(m, 1, [-1, 4, 16])),
        "Gemm .*4 columns, weights for 2",
    ),
    "sums of tokens": ("minima", model(SEGMENT, numbers("ReduceSum", 1, [0])), "ReduceSum .*it cuts or joins tokens"),
    "sums of blocks": (
        "minima",
        model(SEGMENT, numbers("ReduceSum", 1, [1])),
        "Gemm .*32 columns, weights for 2",
    ),
    "sums along two axes": ("minima", model(SEGMENT, numbers("ReduceSum", 1, [1, 2])), "ReduceSum .*2 axes"),
    "sums along a value": (
        "minima",
        model(SEGMENT, lambda m: replace(m, nodes(m, "ReduceSum")[0], 1, "residual")),
        "ReduceSum .*is not a constant",
    ),
    "sums that stay": ("minima", model(SEGMENT, attribute("ReduceSum", "keepdims", 1)), "Gemm .*lies across"),
    "sums of blocks of many tokens": (
        "minima",
        model(SEGMENT, lambda m: sums(m, 1, [-1, 4, 32])),
        "Gemm .*4 columns, weights for 2|does not have the shape",
    ),
    # Tables
    "rows by position": ("fp32", model(FIRST, index_by_position), "Gather .*by ids of tokens"),
    "rows of values": (
        "fp32",
        model(FIRST, lambda m: replace(m, nodes(m, "Gather")[0], 0, "positions")),
        "Gather .*rows of a con",
    ),
    "columns by id": ("fp32", model(FIRST, attribute("Gather", "axis", 1)), "not a table and ids alone"),
    "a table of fewer rows": (
        "fp32",
        model(
            FIRST,
            lambda m: (
                m.graph.initializer.append(numpy_helper.from_array(np.zeros((511, 64), np.float32), "few")),
                replace(m, nodes(m, "Gather")[0], 0, "few"),
            ),
        ),
        "a table of the shape .511, 64. for 512",
    ),
    # Angles
    "angles from token 5": ("fp32", model(SEGMENT, numbers(ROTARY, 1, [5])), "do not begin with the first token"),
    "angles from token -1": ("fp32", model(SEGMENT, numbers(ROTARY, 1, [-1])), "do not begin with the first token"),
    "angles of a list": ("fp32", model(SEGMENT, numbers(ROTARY, 1, [0, 0])), "do not begin with the first token"),
    "angles of values": (
        "fp32",
        model(SEGMENT, lambda m: replace(m, nodes(m, ROTARY)[0], 2, "residual")),
        "another rank|angles",
    ),
    "angles interleaved": ("fp32", model(SEGMENT, attribute(ROTARY, "interleaved", 1)), "RotaryEmbedding .*attributes"),
    "angles of a thousand heads": (
        "fp32",
        model(SEGMENT, attribute(ROTARY, "num_heads", 1000)),
        "RotaryEmbedding .*attributes",
    ),
    # The native library's operators
    "layer 99": ("fp32", model(DECODER, attribute("Attention", "layer", 99)), r"it attends in layers \[99"),
    "layer -1": ("fp32", model(DECODER, attribute("Attention", "layer", -1)), "Attention .*mean key of another shape"),
    "one layer twice": (
        "fp32",
        model(DECODER, attribute("Attention", "layer", 0, at=1)),
        r"it attends in layers \[0, 0, 2\]",
    ),
    "layers in another order": (
        "fp32",
        model(DECODER, lambda m: (attribute("Attention", "layer", 1)(m), attribute("Attention", "layer", 0, at=1)(m))),
        r"it attends in layers \[1, 0, 2\]",
    ),
    "rotation 4": ("fp32", model(DECODER, attribute("Attention", "rotate", 4)), "no heads of queries, keys and values"),
    "rotation 2^40": ("fp32", model(DECODER, attribute("Attention", "rotate", 1 << 40)), "no heads of queries"),
    "half a basis": ("fp32", model(DECODER, lambda m: nodes(m, "Attention")[0].input.pop()), "Attention .*6 inputs"),
    "parts of a basis in another order": (
        "fp32",
        model(DECODER, lambda m: nodes(m, "Attention")[0].input.append(nodes(m, "Attention")[0].input.pop(4))),
        "basis",
    ),
    "values for a mean": (
        "fp32",
        model(DECODER, lambda m: replace(m, nodes(m, "Attention")[0], 3, "ids")),
        "not float32",
    ),
    "a sum of another shape": (
        "fp32",
        model(DECODER, lambda m: replace(m, nodes(m, "AddNorm")[0], 1, nodes(m, "Attention")[0].input[1])),
        "AddNorm .*two values",
    ),
    "a sum's gain of values": (
        "fp32",
        model(DECODER, lambda m: replace(m, nodes(m, "AddNorm")[0], 2, nodes(m, "AddNorm")[0].input[0])),
        "its gains",
    ),
    "blocks of 3 rotated": (
        "fp32",
        model(DECODER, attribute("AddNorm", "block", 3)),
        "64 columns rotated in blocks of 3",
    ),
    "blocks of 128 rotated": ("fp32", model(DECODER, attribute("AddNorm", "block", 128)), "rotated in blocks of 128"),
    "blocks below nothing rotated": ("fp32", model(DECODER, attribute("SwiGLU", "block", -4)), "in blocks of -4"),
    "blocks of 2^40 rotated": (
        "fp32",
        model(DECODER, attribute("SwiGLU", "block", 1 << 40)),
        "172 columns rotated in bl",
    ),
    "three sums": (
        "fp32",
        model(DECODER, lambda m: nodes(m, "AddNorm")[0].output.append("third")),
        "AddNorm .*3 outputs",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_graph_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    refused_of(request, *ATTACKS[name])
