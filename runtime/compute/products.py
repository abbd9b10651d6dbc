"""Which products of a graph the native library takes, their weights, packed for it, and what it does between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvq.runtime.bundle.chaining import ADD_NORM, ATTENTION, SWIGLU, with_chains
from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.bundle.onnx_file import Node, Region
from kvq.runtime.bundle.renaming import Attributes, Matrix, rows_alike, with_products
from kvq.runtime.native import chains
from kvq.runtime.native.chains import ChainStep, StepChain
from kvq.runtime.native.matrices import BETWEEN, PANEL, PackedMatrix, multiplies, packs

KINDS = {ADD_NORM: chains.ADD_NORM, SWIGLU: chains.SWIGLU, ATTENTION: chains.ATTENTION}  # all others are products
READ_BYTES = 1 << 20  # of codes at a time


class OwnProducts(NamedTuple):
    """What a graph refers to, to be kept for as long as that.

    Attributes:
        matrices: what it multiplies with.
        chains: what it does one after the other.
        rows_alike: whether its products give a row the same bits among several as alone.
    """

    matrices: list[PackedMatrix]
    chains: list[StepChain]
    rows_alike: bool

    @property
    def spared(self) -> int:
        """Bytes of weights fewer than in the file."""
        return sum(matrix.spared for matrix in self.matrices)


def own_products(graph: bytes, folder: Path, kernel: int, threads: int) -> tuple[bytes, OwnProducts]:
    """A graph whose products with quantized weights are the library's, where it has them, and what stands between.

    Args:
        graph: that was checked.
        folder: of the bundle.
        kernel: index of the instruction set, see `kvq.runtime.native.library.kernels`.
        threads: that pack.

    Raises:
        OSError, MemoryError: the weights cannot be read.
    """
    packed: list[PackedMatrix] = []
    chained: list[StepChain] = []
    if not multiplies(kernel):
        return graph, OwnProducts(packed, chained, rows_alike(graph))
    filled: list[Future[None]] = []

    def take(matrix: Matrix) -> Attributes | None:
        matrix = matrix._replace(bits=_bits(matrix, folder / WEIGHTS))
        zeros, offsets = (part is not None for part in (matrix.zeros, matrix.offsets))
        if not packs(matrix.bits, matrix.block, zeros, offsets):
            return None
        halves = _halves(matrix, folder / WEIGHTS)
        packed.append(PackedMatrix(matrix.n, matrix.k, matrix.bits, matrix.block, zeros, offsets, halves))
        filled.append(pool.submit(_fill, packed[-1], folder / WEIGHTS, matrix, kernel))
        return {"matrix": packed[-1].address, "kernel": kernel}

    def take_chain(nodes: Sequence[Node]) -> Attributes:
        chained.append(StepChain([_step(node) for node in nodes], kernel, threads))
        return {"chain": chained[-1].address}

    with ThreadPoolExecutor(threads) as pool:
        graph = with_products(graph, take)
    for future in filled:
        future.result()
    return with_chains(graph, take_chain), OwnProducts(packed, chained, rows_alike(graph))


def _step(node: Node) -> ChainStep:
    numbers = node.attributes
    kind = KINDS.get(node.operator, chains.PRODUCT)
    matrix, block, epsilon, layer, rotate = (
        numbers.get(name, 0) for name in ("matrix", "block", "epsilon", "layer", "rotate")
    )
    inputs = len(node.inputs) - 1 if kind == chains.ATTENTION else 0
    return ChainStep(kind, matrix, block, epsilon, layer, rotate, inputs)


def _bits(matrix: Matrix, file: Path) -> int:
    """Bits that its codes need: MatMulNBits knows 4 and 8, so codes and zero points of 5 and 6 lie in a byte each."""
    if matrix.bits != 8 or matrix.zeros is None:
        return matrix.bits
    blocks, most = -(-matrix.k // matrix.block), 0
    for region, row in ((matrix.zeros, blocks), (matrix.codes, blocks * matrix.block)):
        for part in _parts(matrix.n, row):
            most = max(most, int(_rows(file, region, np.uint8, (matrix.n, row), part).max()))
            if most >> BETWEEN[-1]:
                return matrix.bits
    return next(bits for bits in BETWEEN if not most >> bits)


def _parts(rows: int, nbytes: int) -> Iterator[slice]:
    """Rows of so many bytes each in parts of about READ_BYTES, whole panels but for the last: they are not in memory at
    once.
    """
    some = max(1, READ_BYTES // nbytes // PANEL) * PANEL
    return (slice(first, first + some) for first in range(0, rows, some))


def _halves(matrix: Matrix, file: Path) -> bool:
    """Whether its scales, and offsets beside them, are all halves, as a GGUF has them, where the library takes such."""
    shape = matrix.n, -(-matrix.k // matrix.block)
    if matrix.offsets is None and matrix.bits not in BETWEEN:
        return False
    for region in (matrix.scales, matrix.offsets):
        if region is None:
            continue
        numbers = _rows(file, region, np.float32, shape, slice(None))
        with np.errstate(over="ignore", invalid="ignore"):
            if not (np.isfinite(numbers) & (numbers.astype(np.float16) == numbers)).all():
                return False
    return True


def _fill(packed: PackedMatrix, file: Path, matrix: Matrix, kernel: int) -> None:
    """Read and pack a matrix, some rows at a time: it is not in memory twice."""
    of_codes, of_scales, of_zeros = packed.shapes
    for part in _parts(matrix.n, math.prod(of_codes[1:])):
        codes = _rows(file, matrix.codes, np.uint8, of_codes, part)
        scales = _rows(file, matrix.scales, np.float32, of_scales, part)
        zeros = None if matrix.zeros is None else _rows(file, matrix.zeros, np.uint8, of_zeros, part)
        offsets = None if matrix.offsets is None else _rows(file, matrix.offsets, np.float32, of_scales, part)
        packed.fill(kernel, codes, scales, zeros, part.start, offsets)


def _rows(file: Path, region: Region, dtype: Any, shape: tuple[int, ...], rows: slice) -> np.ndarray:
    """Some rows of the array of a shape that lies in a region.

    Raises:
        OSError: the file ends before, or cannot be read.
    """
    begin, end, _ = rows.indices(shape[0])
    count, item = math.prod(shape[1:]), np.dtype(dtype).itemsize
    found = np.fromfile(file, dtype, (end - begin) * count, offset=region.offset + begin * count * item)
    if found.size < (end - begin) * count:
        raise OSError(f"{file.name} is shorter than it was")
    return found.reshape(end - begin, *shape[1:])
