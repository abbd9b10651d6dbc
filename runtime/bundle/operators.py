"""The operators of our graphs that do not multiply with weights: what each takes and what it yields.

A rule knows how many inputs and outputs an operator has, which attributes, and computes types and shapes of its outputs
from those of its inputs; what does not fit is a `Misfit`. Numbers are float32 throughout: whole numbers are indices,
shapes, axes and codes, which are cast, looked up or handed on, and never calculated with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.onnx_file import FLOAT32, INT64, UINT8
from kvq.runtime.bundle.shapes import Misfit, Shape, Value, axis_of, broadcast, fixed, reshaped

Attributes = Mapping[str, Any]
# infer(inputs, attributes, outputs) -> shapes of the outputs, which are float32.
Infer = Callable[[list[Value], Attributes, int], list[Shape]]


class Rule(NamedTuple):
    """What an operator may look like.

    Attributes:
        inputs: how many it may have.
        attributes: all that it has, and the type of each.
        optional: others that it may have.
        infer: shapes of its outputs.
        outputs: how many; None where `infer` says it.
        floats: how many of its inputs, from the first on, have to be float32; None is all.
    """

    inputs: tuple[int, ...]
    attributes: Mapping[str, type]
    infer: Infer
    outputs: int | None = 1
    floats: int | None = None
    optional: Mapping[str, type] = MappingProxyType({})


def constant_numbers(value: Value) -> tuple[int, ...]:
    """The numbers of a list that stands in the graph."""
    if value.numbers is None or len(value.shape) != 1:
        raise Misfit("a list of numbers is not a constant of the graph")
    return value.numbers


def one_number(value: Value) -> int:
    """The number of a list of one."""
    if len(numbers := constant_numbers(value)) != 1:
        raise Misfit(f"{len(numbers)} axes")
    return numbers[0]


def _same(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    return [inputs[0].shape]


def _two(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    return [broadcast(inputs[0].shape, inputs[1].shape)]


def _cast(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    if attributes["to"] != FLOAT32 or inputs[0].dtype not in (INT64, UINT8):
        raise Misfit(f"from type {inputs[0].dtype} to type {attributes['to']}")
    return [inputs[0].shape]


def _concat(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    first = inputs[0].shape
    axis = axis_of(attributes["axis"], len(first))
    size = 0
    for value in inputs:
        shape = value.shape
        if len(shape) != len(first) or shape[:axis] != first[:axis] or shape[axis + 1 :] != first[axis + 1 :]:
            raise Misfit("parts of different shapes")
        if (shape[axis] < 0) != (first[axis] < 0):
            raise Misfit("it cuts or joins tokens")
        size += shape[axis]
    return [(*first[:axis], size, *first[axis + 1 :])]


def _split(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape, sizes = inputs[0].shape, constant_numbers(inputs[1])
    axis = axis_of(attributes["axis"], len(shape))
    if len(sizes) != outputs or min(sizes) < 1 or sum(sizes) != fixed(shape[axis]):
        raise Misfit(f"{shape[axis]} in parts of {sizes!r:.60}")
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def _slice(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape = inputs[0].shape
    start, stop, axis = (one_number(value) for value in inputs[1:])
    axis = axis_of(axis, len(shape))
    if not 0 <= start < stop <= fixed(shape[axis]):
        raise Misfit(f"{start}:{stop} of {shape[axis]}")
    return [(*shape[:axis], stop - start, *shape[axis + 1 :])]


def _pad(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape, widths = inputs[0].shape, constant_numbers(inputs[1])
    rank = len(shape)
    if len(widths) != 2 * rank or min(widths) < 0:
        raise Misfit(f"by {widths!r:.60}")
    more = [widths[i] + widths[i + rank] for i in range(rank)]
    return [tuple(fixed(size) + extra if extra else size for size, extra in zip(shape, more, strict=True))]


def _transpose(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape, perm = inputs[0].shape, attributes["perm"]
    if sorted(perm) != list(range(len(shape))):
        raise Misfit(f"axes {perm!r:.60} of {len(shape)}")
    return [tuple(shape[i] for i in perm)]


def _reshape(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    return [reshaped(inputs[0].shape, constant_numbers(inputs[1]))]


def _reduce(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape = inputs[0].shape
    axis = axis_of(one_number(inputs[1]), len(shape))
    fixed(shape[axis])
    if attributes["keepdims"] not in (0, 1):
        raise Misfit(f"keepdims {attributes['keepdims']}")
    return [(*shape[:axis], *([1] if attributes["keepdims"] else []), *shape[axis + 1 :])]


def _log_softmax(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape = inputs[0].shape
    fixed(shape[axis_of(attributes["axis"], len(shape))])
    return [shape]


def _norm(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    value, gain = inputs
    if axis_of(attributes["axis"], len(value.shape)) != len(value.shape) - 1 or attributes["stash_type"] != FLOAT32:
        raise Misfit(f"axis {attributes['axis']}, stash_type {attributes['stash_type']}")
    if attributes["epsilon"] < 0 or not gain.stored or gain.shape != (fixed(value.shape[-1]),):
        raise Misfit("a gain of another shape, or an epsilon below 0")
    return [value.shape]


def _rotary(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    value, start, cosine, sine = inputs
    if any(part.dtype != FLOAT32 for part in (value, cosine, sine)):
        raise Misfit("an input is not float32")
    if start.numbers != (0,) or len(start.shape) != 1:
        raise Misfit("angles that do not begin with the first token's")
    if len(value.shape) != 3 or len(cosine.shape) != 2 or cosine.shape != sine.shape or value.shape[0] != 1:
        raise Misfit("a value or angles of another rank")
    tokens, half = cosine.shape
    if tokens != value.shape[1] or fixed(value.shape[2]) % (2 * fixed(half)):
        raise Misfit("angles that are not those of the value's heads")
    return [value.shape]


AXIS, KEEP = {"axis": int}, {"keepdims": int}
RULES: dict[str, Rule] = {
    **{name: Rule((1,), {}, _same) for name in ("Abs", "Cos", "Exp", "Identity", "Log", "Relu", "Round", "Sin")},
    **{name: Rule((2,), {}, _two) for name in ("Add", "Div", "Max", "Mul", "Sub")},
    **{name: Rule((2,), KEEP, _reduce, floats=1) for name in ("ReduceMax", "ReduceSum", "ReduceSumSquare")},
    "Cast": Rule((1,), {"to": int}, _cast, floats=0),
    "Concat": Rule(tuple(range(1, limits.INPUTS + 1)), AXIS, _concat),
    "LogSoftmax": Rule((1,), AXIS, _log_softmax),
    "Pad": Rule((2,), {}, _pad, floats=1),
    "Reshape": Rule((2,), {}, _reshape, floats=1),
    "SimplifiedLayerNormalization": Rule((2,), {**AXIS, "epsilon": float, "stash_type": int}, _norm),
    "Slice": Rule((4,), {}, _slice, floats=1),
    "Split": Rule((2,), AXIS, _split, outputs=None, floats=1),
    "Transpose": Rule((1,), {"perm": tuple}, _transpose),
    "com.microsoft::FastGelu": Rule((1,), {}, _same),
    "com.microsoft::QuickGelu": Rule((1,), {"alpha": float}, _same),
    "com.microsoft::RotaryEmbedding": Rule((4,), {}, _rotary, floats=0),
}
