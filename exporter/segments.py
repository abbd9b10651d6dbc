"""The ONNX graphs of a model: segments cut at attention, which belongs to the runtime.

Segment i takes the residual stream and the attention output of layer i - 1 and yields the
residual stream and layer i's queries, keys and values. Inside a segment all tensors are
[tokens, features]; "tokens" is the only free dimension. The decoder is the same computation as
one graph, with operators of the native library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from onnx import TensorProto

from kvq.exporter.architectures.llama import EMBEDDING, FINAL_NORM, HEAD
from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.graph import CONTRIB, KVQ, Graph, WeightFile
from kvq.exporter.matrices import Matrices, StoredMatrix
from kvq.exporter.rotation import rotate_inputs, rotate_outputs

QKV = ["q_proj", "k_proj", "v_proj"]
INPUT_NORM = "model.layers.{}.input_layernorm.weight"

# MatMulNBits' accuracy_level: 0 keeps activations in float32, 4 quantizes them to int8 on the fly.
ACCURACY_LEVEL = {"fp32": 0, "int8": 4, "int16-head": 4}


@dataclass(frozen=True)
class SegmentOptions:
    """How the segments are written.

    Attributes:
        weights: "fp32", "auto", "int8" or "int4", see `LAYER_BITS`.
        activations: in products with quantized weights, "int8" (fast), "fp32" (exact), or "int16-head": int8, but
            two bytes a value in front of the head.
        block: elements per scale of a quantized matrix.
        rotation: float32 [head_dim, head_dim] applied to every head of queries, keys and values.
        mean_keys: float32 [layers, kv_heads, head_dim], in the rotated space, subtracted from keys.
        fold_values: values are rotated inside the weights, which costs nothing, but makes new weights of v and o;
            else as they come, which leaves weights that a source holds in blocks as they are.
    """

    weights: str
    activations: str
    block: int
    rotation: np.ndarray
    mean_keys: np.ndarray
    fold_values: bool = True

    @property
    def rotates(self) -> bool:
        """Whether the rotation is one."""
        return not np.array_equal(self.rotation, np.eye(len(self.rotation)))

    @property
    def rotates_values(self) -> bool:
        """Whether values are rotated as they come."""
        return self.rotates and not self.fold_values


class SegmentWriter:
    """Writes the graphs of a checkpoint into a folder and counts the bytes a decode step reads."""

    def __init__(self, checkpoint: Checkpoint, options: SegmentOptions, folder: Path, file: WeightFile) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.folder = folder
        self.file = file
        self.shape = checkpoint.architecture
        self.matrices = Matrices(checkpoint, file, options.weights, options.block)

    def center(self, mean_keys: np.ndarray) -> None:
        """Graphs written from now on subtract these means; see `SegmentOptions`."""
        self.options = replace(self.options, mean_keys=mean_keys)

    def segments(self) -> Iterator[str]:
        """Write the layers + 1 segments one by one, yielding file names."""
        shape = self.shape
        for i in range(shape.layers + 1):
            graph = Graph(f"segment_{i:03d}", self.file)
            if i == 0:
                residual, cosine, sine = self._embedding(graph)
                graph.output(cosine, "cosine", "tokens", shape.head_dim // 2)
                graph.output(sine, "sine", "tokens", shape.head_dim // 2)
            else:
                residual = graph.input("residual", "tokens", shape.hidden)
                attention = graph.input("attention", "tokens", shape.heads * shape.head_dim)
                if self.options.rotates_values:
                    attention = self._rotated(graph, attention, shape.heads)
                residual = graph.op("Add", *self._after_attention(graph, i - 1, residual, attention))
                if i < shape.layers:
                    cosine, sine = (graph.input(n, "tokens", shape.head_dim // 2) for n in ("cosine", "sine"))
            graph.output(residual, "residual_out", "tokens", shape.hidden)
            if i < shape.layers:
                self._before_attention(graph, i, residual, cosine, sine)
            yield graph.save(self.folder)

    def decoder(self) -> str:
        """All segments as one graph: ids, positions [tokens] -> residual_out [tokens, hidden].

        Between the products stand the native library's operators: what the segments spell out around
        attention and in the feed-forward block, seventeen small nodes a layer, is four of them here.
        """
        shape, graph = self.shape, Graph("decoder", self.file)
        residual, cosine, sine = self._embedding(graph)
        # Bit 0: queries and keys; bit 1: values, and back what attention makes of them.
        rotate = int(self.options.rotates) + 2 * int(self.options.rotates_values)
        normed = self._norm(graph, residual, INPUT_NORM.format(0))
        for i in range(shape.layers):
            # Under a name of its own if there is one: graphs are written once before means are known.
            centered = "mean_key" if self.options.mean_keys[i].any() else "no_mean_key"
            mean = graph.weight(f"model.layers.{i}.{centered}", self.options.mean_keys[i])
            qkv = self._queries_keys_values(graph, i, normed)
            attention = graph.op("Attention", qkv, cosine, sine, mean, domain=KVQ, layer=i, rotate=rotate)
            residual, change = self._after_attention(graph, i, residual, attention, native=True)
            if i + 1 < shape.layers:
                residual, normed = self._add_norm(graph, residual, change, INPUT_NORM.format(i + 1), native=True)
        graph.output(graph.op("Add", residual, change), "residual_out", "tokens", shape.hidden)
        return graph.save(self.folder)

    def head(self) -> str:
        """Final norm and language-model head: residual [rows, hidden] -> logits [rows, vocab]."""
        graph = Graph("head", self.file)
        residual = graph.input("residual", "rows", self.shape.hidden)
        normed = self._norm(graph, residual, FINAL_NORM)
        matrix = self.matrices.table(EMBEDDING if self.checkpoint.model.tied else HEAD)
        product = self._two_byte_product if self.options.activations == "int16-head" else self._product
        graph.output(product(graph, normed, matrix), "logits", "rows", self.shape.vocab)
        return graph.save(self.folder)

    def uncertainty(self) -> str:
        """Entropy in nats and largest probability of softmax(logits), per row.

        With z = logits - max: entropy = log(sum e^z) - sum(z e^z) / sum e^z, largest = 1 / sum e^z.
        """
        graph = Graph("uncertainty", self.file)
        logits = graph.input("logits", "rows", self.shape.vocab)
        last = graph.constant([-1])
        z = graph.op("Sub", logits, graph.op("ReduceMax", logits, last, keepdims=1))
        exponential = graph.op("Exp", z)
        total = graph.op("ReduceSum", exponential, last, keepdims=0)
        weighted = graph.op("ReduceSum", graph.op("Mul", exponential, z), last, keepdims=0)
        entropy = graph.op("Sub", graph.op("Log", total), graph.op("Div", weighted, total))
        graph.output(entropy, "entropy", "rows")
        graph.output(graph.op("Div", graph.constant(1.0, np.float32), total), "confidence", "rows")
        return graph.save(self.folder)

    def _embedding(self, graph: Graph) -> tuple[str, str, str]:
        """Token ids and positions -> residual stream, cosine and sine of the rotary angles."""
        ids = graph.input("ids", "tokens", dtype=TensorProto.INT64)
        positions = graph.input("positions", "tokens", dtype=TensorProto.INT64)
        table = self.matrices.table(EMBEDDING)
        if table.bits:
            residual = self._gather_quantized(graph, ids, table)
        else:
            residual = graph.op("Gather", graph.stored(EMBEDDING), ids)

        column = graph.op("Reshape", graph.op("Cast", positions, to=TensorProto.FLOAT), graph.constant([-1, 1]))
        angles = graph.op("Mul", column, graph.constant(self.checkpoint.model.inv_freq[None], np.float32))
        parts = []
        for kind in ("Cos", "Sin"):
            part = graph.op(kind, angles)
            if self.checkpoint.model.rope_scale != 1.0:
                part = graph.op("Mul", part, graph.constant(self.checkpoint.model.rope_scale, np.float32))
            parts.append(part)
        return residual, parts[0], parts[1]

    def _gather_quantized(self, graph: Graph, ids: str, table: StoredMatrix) -> str:
        """Rows of an 8-bit table, decoded; the table is the same tensor as a tied head's."""
        codes = graph.op("Gather", graph.stored(f"{table.name}.codes"), ids)
        scales = graph.op("Gather", graph.stored(f"{table.name}.scales"), ids)
        centred = graph.op("Sub", graph.op("Cast", codes, to=TensorProto.FLOAT), graph.constant(128.0, np.float32))
        blocks = -(-table.k // table.block)
        rows = graph.op("Mul", centred, graph.op("Reshape", scales, graph.constant([-1, blocks, 1])))
        rows = graph.op("Reshape", rows, graph.constant([-1, blocks * table.block]))
        if blocks * table.block == table.k:
            return rows
        return graph.op("Slice", rows, graph.constant([0]), graph.constant([table.k]), graph.constant([1]))

    def _queries_keys_values(self, graph: Graph, layer: int, normed: str) -> str:
        """Projections of the normalised residual stream: [tokens, (heads + 2 kv_heads) * head_dim]."""
        change = self._rotate_values if self.options.rotates and self.options.fold_values else None
        return self._projection(graph, normed, f"model.layers.{layer}.self_attn", QKV, change)

    def _before_attention(self, graph: Graph, layer: int, residual: str, cosine: str, sine: str) -> None:
        """Norm, projections, rotary embedding, rotation, centring -> query_key, value."""
        shape, rotation = self.shape, self.options.rotation
        both = shape.heads + shape.kv_heads
        qkv = self._queries_keys_values(graph, layer, self._norm(graph, residual, INPUT_NORM.format(layer)))
        query_key, value = graph.split(qkv, [both * shape.head_dim, shape.kv_heads * shape.head_dim])
        query_key = graph.op(
            "RotaryEmbedding",
            graph.op("Reshape", query_key, graph.constant([1, -1, both * shape.head_dim])),
            graph.constant([0]),  # row i of cosine and sine belongs to token i
            cosine,
            sine,
            domain=CONTRIB,
        )
        query_key = graph.op("Reshape", query_key, graph.constant([-1, both, shape.head_dim]))
        if self.options.rotates:
            query_key = graph.op("MatMul", query_key, graph.weight("rotation", rotation))
        if self.options.mean_keys[layer].any():
            mean = np.zeros((both, shape.head_dim), np.float32)
            mean[shape.heads :] = self.options.mean_keys[layer]
            query_key = graph.op("Sub", query_key, graph.weight(f"model.layers.{layer}.mean_keys", mean))
        graph.output(query_key, "query_key", "tokens", both, shape.head_dim)
        if self.options.rotates_values:
            value = self._rotated(graph, value, shape.kv_heads)
        value = graph.op("Reshape", value, graph.constant([-1, shape.kv_heads, shape.head_dim]))
        graph.output(value, "value", "tokens", shape.kv_heads, shape.head_dim)

    def _rotated(self, graph: Graph, x: str, heads: int) -> str:
        """Every head of x [tokens, heads * head_dim] rotated; the rotation is its own inverse."""
        split = graph.op("Reshape", x, graph.constant([-1, heads, self.shape.head_dim]))
        rotated = graph.op("MatMul", split, graph.weight("rotation", self.options.rotation))
        return graph.op("Reshape", rotated, graph.constant([-1, heads * self.shape.head_dim]))

    def _rotate_values(self, stacked: np.ndarray) -> np.ndarray:
        """Rotate the value rows at the end of a stacked q, k, v weight or bias."""
        start = (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim
        return np.concatenate([stacked[:start], rotate_outputs(stacked[start:], self.options.rotation)])

    def _after_attention(
        self, graph: Graph, layer: int, residual: str, attention: str, native: bool = False
    ) -> tuple[str, str]:
        """Output projection, added to the residual stream, and what the feed-forward block will add to it."""
        shape, prefix = self.shape, f"model.layers.{layer}"

        def unrotate(x: np.ndarray) -> np.ndarray:
            return rotate_inputs(x, self.options.rotation) if x.ndim == 2 else x  # a bias is added after

        change = unrotate if self.options.rotates and self.options.fold_values else None
        output = self._projection(graph, attention, f"{prefix}.self_attn", ["o_proj"], change)
        residual, normed = self._add_norm(graph, residual, output, f"{prefix}.post_attention_layernorm.weight", native)
        both = self._projection(graph, normed, f"{prefix}.mlp", ["gate_proj", "up_proj"])
        if native:
            inner = graph.op("SwiGLU", both, domain=KVQ)
        else:
            gate, up = graph.split(both, [shape.ffn, shape.ffn])
            inner = graph.op("Mul", graph.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)  # alpha 1 is SiLU
        return residual, self._projection(graph, inner, f"{prefix}.mlp", ["down_proj"])

    def _norm(self, graph: Graph, x: str, name: str) -> str:
        """RMS norm."""
        gain = graph.weight(name, self.checkpoint.tensor(name))
        epsilon = self.checkpoint.model.norm_epsilon
        return graph.op("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=epsilon, stash_type=1)

    def _add_norm(self, graph: Graph, x: str, y: str, name: str, native: bool = False) -> tuple[str, str]:
        """x + y and its RMS norm."""
        if native:
            gain = graph.weight(name, self.checkpoint.tensor(name))
            epsilon = self.checkpoint.model.norm_epsilon
            total, normed = graph.ops("AddNorm", 2, x, y, gain, domain=KVQ, epsilon=epsilon)
            return total, normed
        total = graph.op("Add", x, y)
        return total, self._norm(graph, total, name)

    def _projection(
        self,
        graph: Graph,
        x: str,
        prefix: str,
        parts: list[str],
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> str:
        """One product for the linear layers `parts` that share an input; `change` is applied to weight and bias."""
        name = f"{prefix}.{'+'.join(parts)}"
        bias = f"{name}.bias"
        if (
            bias not in self.file
            and (values := self.checkpoint.stacked([f"{prefix}.{p}.bias" for p in parts])) is not None
        ):
            self.file.add(bias, values if change is None else change(values))
        matrix = self.matrices.projection(name, [f"{prefix}.{p}.weight" for p in parts], change)
        product = self._product(graph, x, matrix)
        return graph.op("Add", product, graph.stored(bias)) if bias in self.file else product

    def _product(self, graph: Graph, x: str, matrix: StoredMatrix) -> str:
        """x [tokens, k] times the transpose of a matrix [n, k]."""
        matrix.read = True
        if not matrix.bits:
            return graph.op("Gemm", x, graph.stored(matrix.name), transB=1)
        return graph.op(
            "MatMulNBits",
            x,
            graph.stored(f"{matrix.name}.codes"),
            graph.stored(f"{matrix.name}.scales"),
            domain=CONTRIB,
            K=matrix.k,
            N=matrix.n,
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=ACCURACY_LEVEL[self.options.activations],
        )

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
