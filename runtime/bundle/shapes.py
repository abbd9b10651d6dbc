"""Types and shapes of the values of a graph, as far as they can be known before it runs.

A dimension is a number of features, or a number of features for each token: the tokens of a pass are not known before
it runs. It is an int, n for n and -n for n times the tokens. A value has at most one dimension of the second kind, so
its memory grows with the tokens and no faster.
"""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, ...]
TOKENS = -1


class Misfit(ValueError):
    """A node that does not fit its inputs, in a few words."""


class Value(NamedTuple):
    """A value of a graph.

    Attributes:
        dtype: of `kvq.runtime.bundle.onnx_file`.
        shape: see above.
        stored: it is a constant that the graph names, not computed.
        numbers: of a constant of a few whole numbers, else None.
        name: of an input of the graph, else empty.
    """

    dtype: int
    shape: Shape
    stored: bool = False
    numbers: tuple[int, ...] | None = None
    name: str = ""


def elements(shape: Shape) -> int:
    """How many there are, below 0 for so many a token.

    Raises:
        Misfit: their number grows with the square of the tokens.
    """
    count, by_token = 1, 0
    for size in shape:
        count *= size
        by_token += size < 0
    if by_token > 1:
        raise Misfit("a value grows with the square of the tokens")
    return count


def axis_of(axis: int, rank: int) -> int:
    """An axis from 0, of one that may be counted from the last."""
    if not -rank <= axis < rank:
        raise Misfit(f"axis {axis} of {rank}")
    return axis % rank


def fixed(size: int) -> int:
    """A dimension that does not depend on the tokens."""
    if size < 0:
        raise Misfit("it cuts or joins tokens")
    return size


def broadcast(left: Shape, right: Shape) -> Shape:
    """The shape of what is computed element by element from two values, as numpy has it."""
    if left == right:
        return left
    if len(left) < len(right):
        left, right = right, left
    shape = list(left)
    for i in range(-1, -1 - len(right), -1):
        if shape[i] == 1:
            shape[i] = right[i]
        elif right[i] not in (1, shape[i]):
            raise Misfit(f"shapes {show(left)} and {show(right)}")
    return tuple(shape)


def reshaped(shape: Shape, target: tuple[int, ...]) -> Shape:
    """The shape that a target gives: 0 is the dimension that was at its place, and one may be -1, what is left over."""
    if not 0 < len(target) <= 4 or target.count(-1) > 1 or min(target) < -1:
        raise Misfit(f"a shape of {target!r:.60}")
    if 0 in target[len(shape) :]:
        raise Misfit(f"a shape of {target!r:.60} for {show(shape)}")
    given = [shape[i] if size == 0 else size for i, size in enumerate(target)]
    count, known = elements(shape), 1
    for size, asked in zip(given, target, strict=True):
        known *= 1 if asked == -1 else size
    rest, over = divmod(abs(count), abs(known))
    rest = -rest if (count < 0) != (known < 0) else rest  # of the tokens, unless another dimension is
    if over or (-1 not in target and rest != 1):
        raise Misfit(f"{show(shape)} does not have the shape {target!r:.60}")
    return tuple(rest if asked == -1 else size for size, asked in zip(given, target, strict=True))


def show(shape: Shape) -> str:
    """A shape, for people."""
    names = ["tokens" if size == TOKENS else f"{-size}*tokens" if size < 0 else str(size) for size in shape]
    return f"[{', '.join(names)}]"
