"""Products with the weight matrices of a bundle, and rows of its embedding, as nodes of a graph."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from kvq.exporter.architectures.description import Project
from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.graphs.builder import CONTRIB, Graph
from kvq.exporter.graphs.options import ACCURACY_LEVEL, GraphOptions
from kvq.exporter.rotation import hadamard
from kvq.exporter.weights.file import WeightFile
from kvq.exporter.weights.matrices import Change, Knowledge, Matrices, StoredMatrix
from kvq.exporter.weights.quantize import held


class Products:
    """Puts a matrix into the weights file where a graph first needs it, and its product into the graph.

    Args:
        checkpoint: where the matrices come from.
        file: where they go.
        options: how.
        knowledge: of the matrices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        file: WeightFile,
        options: GraphOptions,
        knowledge: Knowledge,
    ) -> None:
        self._checkpoint, self._file, self._activations = checkpoint, file, options.activations
        self._turns = options.turns
        self.matrices = Matrices(
            checkpoint, file, options.weights, options.activations, options.block, knowledge or Knowledge()
        )

    def turn(self, step: Project, change: Change | None = None) -> int:
        """Size of the blocks in which `project` wants its x rotated, 0 for not at all; asked before it is called."""
        return self.matrices.projection(step.name, step.weights, change, self._turns).turn

    def turned(self, graph: Graph, x: str, block: int) -> str:
        """x [tokens, features] with every block of features rotated; the rotation is its own inverse."""
        blocks = graph.op("Reshape", x, graph.constant([0, -1, block]))
        rotated = graph.op("MatMul", blocks, graph.weight(f"hadamard_{block}", hadamard(block)))
        return graph.op("Reshape", rotated, graph.constant([0, -1]))

    def project(self, graph: Graph, x: str, step: Project, change: Change | None = None) -> str:
        """x [tokens, columns] -> [tokens, sum of rows]; `change` is applied to the stacked weight and bias."""
        bias = f"{step.name}.bias"
        if step.bias and bias not in self._file:
            values = self._checkpoint.stacked(step.biases)
            self._file.add(bias, values if change is None else change(values))
        product = self._product(graph, x, self.matrices.projection(step.name, step.weights, change))
        return graph.op("Add", product, graph.stored(bias)) if step.bias else product

    def head(self, graph: Graph, x: str) -> str:
        """x [rows, hidden] -> logits [rows, vocab]."""
        matrix = self.matrices.table(self._checkpoint.model.head, self._turns)
        x = self.turned(graph, x, matrix.turn) if matrix.turn else x
        product = self._two_byte_product if self._activations == "int16-head" else self._product
        return product(graph, x, matrix)

    def embedding(self, graph: Graph, ids: str) -> str:
        """ids [tokens] -> rows of the embedding [tokens, hidden]."""
        table = self.matrices.table(self._checkpoint.model.embedding, self._turns)
        if not table.bits:
            return graph.op("Gather", graph.stored(table.name), ids)
        rows = self._decoded(graph, ids, table)
        return self.turned(graph, rows, table.turn) if table.turn else rows

    def _decoded(self, graph: Graph, ids: str, table: StoredMatrix) -> str:
        """Rows of a quantized table, which may be the same tensor as a tied head's."""
        codes = graph.op("Gather", graph.stored(f"{table.name}.codes"), ids)
        scales = graph.op("Gather", graph.stored(f"{table.name}.scales"), ids)
        centred = graph.op("Sub", graph.op("Cast", codes, to=TensorProto.FLOAT), graph.constant(128.0, np.float32))
        blocks = -(-table.k // table.block)
        rows = graph.op("Mul", centred, graph.op("Reshape", scales, graph.constant([-1, blocks, 1])))
        rows = graph.op("Reshape", rows, graph.constant([-1, blocks * table.block]))
        if blocks * table.block == table.k:
            return rows
        return graph.op("Slice", rows, graph.constant([0]), graph.constant([table.k]), graph.constant([1]))

    def _product(self, graph: Graph, x: str, matrix: StoredMatrix) -> str:
        """x [tokens, k] times the transpose of a matrix [n, k]."""
        matrix.read = True
        if not matrix.bits:
            return graph.op("Gemm", x, graph.stored(matrix.name), transB=1)
        sums = self._sums(graph, x, matrix) if matrix.offsets else ""
        product = graph.op(
            "MatMulNBits",
            x,
            *map(graph.stored, matrix.parts),
            domain=CONTRIB,
            K=matrix.k,
            N=matrix.n,
            bits=held(matrix.bits),
            block_size=matrix.block,
            accuracy_level=ACCURACY_LEVEL[self._activations],
        )
        return graph.op("Gemm", sums, graph.stored(matrix.offsets), product, transB=1) if sums else product

    def _sums(self, graph: Graph, x: str, matrix: StoredMatrix) -> str:
        """Sums of x [tokens, k] in the blocks of a matrix that has whole ones, [tokens, k // block]."""
        blocks = graph.op("Reshape", x, graph.constant([-1, matrix.k // matrix.block, matrix.block]))
        return graph.op("ReduceSum", blocks, graph.constant([-1]), keepdims=0)

    def _two_byte_product(self, graph: Graph, x: str, matrix: StoredMatrix) -> str:
        """`_product` with x as the sum of two rows of int8: what one byte holds of it, and the rest.

        The weights are read once for both. A block's scale is what MatMulNBits takes itself, the largest
        magnitude / 127, so it rounds the first row to just the codes it is made of here.
        """
        if not matrix.bits:
            return self._product(graph, x, matrix)
        blocks = -(-matrix.k // matrix.block)
        if missing := blocks * matrix.block - matrix.k:
            x = graph.op("Pad", x, graph.constant([0, 0, 0, missing]))
        x = graph.op("Reshape", x, graph.constant([-1, blocks, matrix.block]))
        largest = graph.op("ReduceMax", graph.op("Abs", x), graph.constant([-1]), keepdims=1)
        step = graph.op(
            "Max", graph.op("Div", largest, graph.constant(127.0, np.float32)), graph.constant(1e-30, np.float32)
        )
        coarse = graph.op("Mul", graph.op("Round", graph.op("Div", x, step)), step)
        rows = graph.op("Concat", coarse, graph.op("Sub", x, coarse), axis=0)
        rows = graph.op("Reshape", rows, graph.constant([-1, blocks * matrix.block]))
        if missing:
            rows = graph.op("Slice", rows, graph.constant([0]), graph.constant([matrix.k]), graph.constant([1]))
        product = graph.op("Reshape", self._product(graph, rows, matrix), graph.constant([2, -1, matrix.n]))
        return graph.op("ReduceSum", product, graph.constant([0]), keepdims=0)
