"""The weight matrices of a bundle: carried over from their source, or quantized, each stored once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.rotation import LARGEST_BLOCK, activation_block, hadamard, rotate_inputs
from kvq.exporter.sources.base import BlockForm
from kvq.exporter.weights.compensate import quantize_compensated
from kvq.exporter.weights.file import WeightFile
from kvq.exporter.weights.quantize import QuantizedMatrix, block_for, packed, quantize_matrix

# Bits of what is quantized here. A matrix that its source holds in blocks of no more bits is carried over as it is, by
# "auto" and "source" in its own bits, and the rest takes 8; of "mixed" a plan says which matrices take fewer.
LAYER_BITS = {"fp32": 0, "auto": 8, "source": 8, "int8": 8, "int6": 6, "int5": 5, "int4": 4, "mixed": 8}
KEEPING = ("auto", "source")
OWN = ("mixed", "int6", "int5")  # for which nothing is carried over
# Blocks of a source whose grid is kept when they are rotated and take 8 bits, see `on_grid`; and matrices whose is not:
# they are half of all products, which take longer in such blocks, and gain least by it.
GRID = BlockForm(4, 32)
OFF_GRID = ("gate_proj", "up_proj", "gate_up_proj")
# The head decides between tokens directly: 4 bits there cost more than they save.
HEAD_BITS = {name: 8 if bits else 0 for name, bits in LAYER_BITS.items()}
Change = Callable[[np.ndarray], np.ndarray]


class Knowledge(NamedTuple):
    """What has been found out about matrices of the layers before they are quantized, by their names.

    Attributes:
        moments: second moments float64 [k, k] of what a matrix is multiplied with, asked in the order of the layers:
            its quantization makes up for its own errors then.
        plan: bits of a matrix, where they are not those of all.
    """

    moments: Callable[[str], np.ndarray] | None = None
    plan: Mapping[str, int] = MappingProxyType({})


@dataclass
class StoredMatrix:
    """A weight matrix [n, k] in the weights file; bits and block are 0 for float32.

    `read` says that a product of a decode step reads it: an embedding is only looked up. `exact` says that its
    source holds the same numbers. `turn` is the size of the blocks along k that are rotated by a Hadamard matrix, as
    what it is multiplied with has to be; 0: none are. `grid` says that they are on the grid of its source. `parts` are
    a quantized one's tensors in the operator's order; `offsets`, float32 [n, k // block], is what is added to its
    blocks' weights, and is multiplied on its own: its name, empty where there are none.
    """

    name: str
    n: int
    k: int
    bits: int
    block: int
    nbytes: int
    exact: bool
    turn: int = 0
    grid: bool = False
    parts: tuple[str, ...] = ()
    offsets: str = ""
    read: bool = False


def carried_over(checkpoint: Checkpoint, weights: str, activations: str, names: list[str]) -> bool:
    """Whether matrices keep the blocks that their source holds.

    With activations of 8 bits only those of 4 bits do, for their size: of 8 bits, blocks of our own lose less, rotated,
    than the activations do in front of blocks that are not. Blocks with minima do where the result has 4 bits and
    "source" asks for them: they take less memory than 8 bits, but a prompt longer.
    """
    table = names[0] in (checkpoint.model.embedding, checkpoint.model.head)
    most = (HEAD_BITS if table else LAYER_BITS)[weights]
    held = [form for form in map(checkpoint.source.block_form, names) if form is not None]
    if weights in OWN or len(held) < len(names) or any(form.bits > most for form in held):
        return False
    bits = max(form.bits for form in held) if weights in KEEPING and not table else most
    if any(form.minima for form in held) and (bits != 4 or (weights != "source" and activations != "fp32")):
        return False
    return activations == "fp32" or (weights in KEEPING and bits == 4)


def on_grid(checkpoint: Checkpoint, weights: str, block: int, names: list[str]) -> bool:
    """Whether matrices that are quantized to 8 bits and rotated take blocks and scales from their source's grids.

    Codes of 4 bits times a Hadamard matrix without its root are whole numbers, nearly all below 128, and a block's
    minimum is in the first of them alone: on a grid of scale / sqrt(32), blocks of 32 are what they were, which the
    grids of our own, of blocks of other sizes, round. One is enough where some are stacked: the others lose nothing.

    Args:
        block: elements per scale that are asked for; not kept where those are fewer, or more than usual.
    """
    held = [checkpoint.source.block_form(name) for name in names]
    fits = any(form is not None and form[:2] == GRID[:2] for form in held)
    fits = fits and not any(name.split(".")[-2] in OFF_GRID for name in names)
    return fits and weights in KEEPING and GRID.block <= block <= LARGEST_BLOCK


class Matrices:
    """Puts matrices into the weights file, and remembers what it has put there.

    Args:
        checkpoint: where they come from.
        file: where they go.
        weights: a key of `LAYER_BITS`.
        activations: of the products, see `carried_over`.
        block: elements per scale of what is quantized here.
        knowledge: of them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        file: WeightFile,
        weights: str,
        activations: str,
        block: int,
        knowledge: Knowledge,
    ) -> None:
        self._checkpoint, self._file, self._weights, self._block = checkpoint, file, weights, block
        self._activations, self._knowledge = activations, knowledge
        self._tables = (checkpoint.model.embedding, checkpoint.model.head)
        self._stored: dict[str, StoredMatrix] = {}

    @property
    def decode_weight_nbytes(self) -> int:
        """Bytes of weights that a decode step reads."""
        return sum(matrix.nbytes for matrix in self._stored.values() if matrix.read)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of them, once the graphs are written."""
        names = {0: "fp32", 4: "int4", 5: "int5", 6: "int6", 8: "int8"}
        of_layers = [matrix for name, matrix in self._stored.items() if name not in self._tables]
        layers = {matrix.bits for matrix in of_layers}
        held = sum(matrix.bits * matrix.n * matrix.k for matrix in of_layers)
        head = self._stored[self._checkpoint.model.head]
        return {
            "layers": names[layers.pop()] if len(layers) == 1 else "mixed",
            "bits": round(held / sum(matrix.n * matrix.k for matrix in of_layers), 2) or 32,
            "head": names[head.bits],
            "block": self._block,
            "exact": sum(matrix.exact for matrix in self._stored.values()),
            "grid": sum(matrix.grid for matrix in self._stored.values()),
            "matrices": len(self._stored),
        }

    def table(self, name: str, turns: bool) -> StoredMatrix:
        """Embedding or head; with `turns` what the head takes is rotated, if it is quantized here."""
        turns = turns and name == self._checkpoint.model.head
        return self._store(name, [name], HEAD_BITS[self._weights], turns=turns)

    def projection(
        self, name: str, parts: list[str], change: Change | None = None, turns: bool = False
    ) -> StoredMatrix:
        """The matrices `parts` of a layer, stacked to [n, k] and changed, stored under `name`.

        With `turns` its inputs can be rotated: they are if it is quantized here.
        """
        return self._store(name, parts, self._knowledge.plan.get(name, LAYER_BITS[self._weights]), change, turns)

    def _store(
        self, name: str, sources: list[str], bits: int, change: Change | None = None, turns: bool = False
    ) -> StoredMatrix:
        """Write a matrix unless it is there."""
        if name in self._stored:
            return self._stored[name]
        quantized = None if change is not None else self._carried_over(sources, bits)
        adapted = any(name in self._checkpoint.model.adapted for name in sources)
        turn, grid, exact = 0, False, not adapted and (quantized is not None or (change is None and not bits))
        if quantized is None:
            matrix = self._checkpoint.stacked(sources)
            matrix = matrix if change is None else change(matrix)
            n, k = matrix.shape
            if not bits:
                self._file.add(name, matrix)
                self._stored[name] = StoredMatrix(name, n, k, 0, 0, matrix.nbytes, exact)
                return self._stored[name]
            turn = activation_block(k) if turns else 0
            grid = bits == 8 and turn > 0 and change is None
            grid = grid and on_grid(self._checkpoint, self._weights, self._block, sources)
            turn = GRID.block if grid else turn
            matrix = rotate_inputs(matrix, hadamard(turn)) if turn else matrix
            quantized = self._on_grid(sources, matrix) if grid else self._quantized(name, matrix, bits)
        held = quantized.tensors
        names = {part: f"{name}.{part}" for part in held}
        for part, array in held.items():
            self._file.add(names[part], array)
        self._stored[name] = StoredMatrix(
            name,
            n=len(quantized.codes),
            k=quantized.k,
            bits=quantized.bits,
            block=quantized.block,
            nbytes=sum(array.nbytes for array in held.values()),
            exact=exact,
            turn=turn,
            grid=grid,
            offsets=names.pop("offsets", ""),
            parts=tuple(names.values()),
        )
        return self._stored[name]

    def _on_grid(self, sources: list[str], rotated: np.ndarray) -> QuantizedMatrix:
        steps = self._checkpoint.steps(sources, GRID) / np.sqrt(np.float32(GRID.block))
        return quantize_matrix(rotated, 8, GRID.block, steps)

    def _quantized(self, name: str, matrix: np.ndarray, bits: int) -> QuantizedMatrix:
        block = block_for(matrix.shape[1], self._block)
        if self._knowledge.moments is None or name in self._tables:
            return quantize_matrix(matrix, bits, block)
        return quantize_compensated(matrix, bits, block, self._knowledge.moments(name))

    def _carried_over(self, parts: list[str], bits: int) -> QuantizedMatrix | None:
        """Stacked matrices as their source holds them, if they keep that."""
        if not carried_over(self._checkpoint, self._weights, self._activations, parts):
            return None
        blocks = self._checkpoint.stacked_blocks(parts)
        if blocks is None:
            return None
        keeps = self._weights in KEEPING and parts[0] not in self._tables  # looked up in 8 bits
        return packed(blocks if keeps else blocks.as_form(blocks.form._replace(bits=bits)))
