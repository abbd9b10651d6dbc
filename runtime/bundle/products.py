"""The operators of our graphs that multiply with weights, look up in them, or are of the native library."""

from __future__ import annotations

from kvq.runtime.bundle.onnx_file import FLOAT32, INT64, UINT8
from kvq.runtime.bundle.operators import Attributes, Rule
from kvq.runtime.bundle.shapes import Misfit, Shape, Value, broadcast, fixed

BLOCK_SIZES = (16, 32, 64, 128, 256)
ROTATIONS = (0, 1, 2, 3, 6, 7)  # bits: keys; values; and what attention makes of these stays as it is
MOST_ROTATED = 1024  # columns of a block that the native library rotates
BLOCK = {"block": int}


def _want(value: Value, what: str, *shapes: Shape, dtype: int = FLOAT32) -> None:
    """Raise Misfit for anything but a constant of such a type and one of the shapes."""
    if not value.stored or value.dtype != dtype or value.shape not in shapes:
        raise Misfit(f"{what} are no constant of the shape {' or '.join(map(str, shapes))}")


def _gemm(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    rows, matrix = inputs[0].shape, inputs[1].shape
    if attributes["transB"] != 1 or len(rows) != 2 or len(matrix) != 2 or not inputs[1].stored:
        raise Misfit("not rows times a matrix of weights that lies across")
    if fixed(rows[1]) != matrix[1]:
        raise Misfit(f"{rows[1]} columns, weights for {matrix[1]}")
    shape = rows[0], matrix[0]
    if len(inputs) == 3 and (inputs[2].stored or inputs[2].shape != shape):  # no sum with another product
        _want(inputs[2], "its biases", (matrix[0],))
    return [shape]


def _matmul(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    left, right = inputs[0].shape, inputs[1].shape
    if len(left) < 2 or len(right) < 2 or min(right) < 0:
        raise Misfit("not rows times a matrix")
    if fixed(left[-1]) != right[-2]:
        raise Misfit(f"{left[-1]} columns, a matrix of {right[-2]} rows")
    return [(*broadcast(left[:-2], right[:-2]), left[-2], right[-1])]


def _matmul_nbits(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    k, n, bits, block = (attributes[name] for name in ("K", "N", "bits", "block_size"))
    if bits not in (4, 8) or block not in BLOCK_SIZES or k < 1 or n < 1 or attributes["accuracy_level"] not in (0, 4):
        raise Misfit(f"K {k}, N {n}, {bits} bits, blocks of {block}, accuracy level {attributes['accuracy_level']}")
    blocks = -(-k // block)
    _want(inputs[1], "its codes", (n, blocks, block * bits // 8), dtype=UINT8)
    _want(inputs[2], "its scales", (n, blocks), (n * blocks,))
    if len(inputs) == 4:
        width = -(-blocks * bits // 8)
        _want(inputs[3], "its zero points", (n, width), (n * width,), dtype=UINT8)
    rows = inputs[0]
    if rows.dtype != FLOAT32 or len(rows.shape) < 2 or fixed(rows.shape[-1]) != k:
        raise Misfit(f"values of another shape than [..., {k}]")
    return [(*rows.shape[:-1], n)]


def _check_rotated(attributes: Attributes, columns: int) -> None:
    """Raise Misfit unless rows of so many columns have the blocks that a node rotates, if it rotates some."""
    block = attributes.get("block", 0)
    if block and (block < 0 or block > MOST_ROTATED or block & (block - 1) or columns % block):
        raise Misfit(f"{columns} columns rotated in blocks of {block}")


def _add_norm(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    left, right, gain = inputs
    if left.shape != right.shape or len(left.shape) != 2 or attributes["epsilon"] < 0:
        raise Misfit("two values of different shapes, or an epsilon below 0")
    _want(gain, "its gains", (fixed(left.shape[1]),))
    _check_rotated(attributes, left.shape[1])
    return [left.shape, left.shape]


def _swiglu(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    shape = inputs[0].shape
    if len(shape) != 2 or fixed(shape[1]) % 2:
        raise Misfit("not an even number of columns")
    _check_rotated(attributes, shape[1] // 2)
    return [(shape[0], shape[1] // 2)]


def _attention(inputs: list[Value], attributes: Attributes, outputs: int) -> list[Shape]:
    """Its shapes among themselves; that they are the model's is seen where the model is known."""
    shapes = [value.shape for value in inputs]
    (tokens, features), angles, mean = shapes[0] if len(shapes[0]) == 2 else (0, 0), shapes[1], shapes[3]
    if len(mean) != 2 or shapes[1] != shapes[2] or angles != (tokens, mean[1] // 2) or attributes["layer"] < 0:
        raise Misfit("angles or a mean key of another shape")
    (kv_heads, head_dim), heads = mean, fixed(features) // mean[1] - 2 * mean[0]
    if heads < 1 or features % head_dim or heads % kv_heads or attributes["rotate"] not in ROTATIONS:
        raise Misfit("features that are no heads of queries, keys and values")
    _want(inputs[3], "its mean keys", mean)
    if len(inputs) > 4:
        rank = shapes[5][1] if len(shapes[5]) == 3 else 0
        if not 0 < rank <= head_dim:
            raise Misfit("a basis of another rank")
        for value, shape in zip(inputs[4:], (mean, (kv_heads, rank, head_dim), (kv_heads, rank)), strict=True):
            _want(value, "parts of its basis", shape)
    return [(tokens, heads * head_dim)]


PRODUCTS: dict[str, Rule] = {
    "Gemm": Rule((2, 3), {"transB": int}, _gemm),
    "MatMul": Rule((2,), {}, _matmul),
    "com.microsoft::MatMulNBits": Rule(
        (3, 4), {"K": int, "N": int, "bits": int, "block_size": int, "accuracy_level": int}, _matmul_nbits, floats=1
    ),
    "kvq::AddNorm": Rule((3,), {"epsilon": float}, _add_norm, outputs=2, optional=BLOCK),
    "kvq::Attention": Rule((4, 7), {"layer": int, "rotate": int}, _attention),
    "kvq::SwiGLU": Rule((1,), {}, _swiglu, optional=BLOCK),
}


def gather(inputs: list[Value], vocab: int) -> tuple[int, Shape]:
    """Type and shape of what Gather yields: rows of a constant table that has one for each of `vocab` ids.

    Raises:
        Misfit: it has not, or is looked up in by something else.
    """
    table, ids = inputs
    if not table.stored or ids.dtype != INT64 or ids.name != "ids" or len(ids.shape) != 1:
        raise Misfit("not rows of a constant by ids of tokens")
    if not table.shape or table.shape[0] != vocab:
        raise Misfit(f"a table of the shape {table.shape} for {vocab} ids")
    return table.dtype, (ids.shape[0], *table.shape[1:])


def work(operator: str, inputs: list[Value], shape: Shape) -> int:
    """Multiplications that a product of this shape takes, for each token if the shape has one."""
    count = abs(inputs[0].shape[-1]) if operator.endswith(("Gemm", "MatMul", "MatMulNBits")) else 1
    for size in shape:
        count *= abs(size)
    return count
