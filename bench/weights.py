"""The weights of a bundle, read back: what other formats are made of, so that all arms run the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from kvq.bench.shapes import Assets
from kvq.exporter.weights.quantize import QuantizedMatrix, unpacked_zeros

EMBEDDING = "model.embed_tokens.weight"


class BundleWeights:
    """Tensors of all segments and the head by name.

    Attributes:
        products: attributes of MatMulNBits (K, N, bits, block_size, accuracy_level) by the matrix's name, such as
            ``model.layers.0.self_attn.q_proj+k_proj+v_proj``.
        tensors: references into the bundle's weights file, or small tensors themselves.
        shape: the model's.
    """

    def __init__(self, made: Assets) -> None:
        self._folder = made.bundle
        self.shape = made.manifest.architecture
        self.products: dict[str, dict[str, int]] = {}
        self.tensors: dict[str, TensorProto] = {}
        for file in [*made.manifest.segments, made.manifest.head]:
            graph = onnx.load(made.bundle / file, load_external_data=False).graph
            self.tensors |= {tensor.name: tensor for tensor in graph.initializer}
            products = [node for node in graph.node if node.op_type == "MatMulNBits"]
            self.products |= {n.input[1].removesuffix(".codes"): {a.name: a.i for a in n.attribute} for n in products}

    def array(self, name: str) -> np.ndarray:
        """A tensor's values."""
        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[name])
        return numpy_helper.to_array(tensor, str(self._folder))

    def parts(self) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Matrices [n, k] under the names of a Hugging Face checkpoint: products that share an input are cut apart."""
        shape = self.shape
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        rows = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": shape.ffn, "up_proj": shape.ffn}
        for name, a in self.products.items():
            codes, scales = self.array(f"{name}.codes"), self.array(f"{name}.scales")
            bits, zeros = a["bits"], None
            if (points := f"{name}.zeros") in self.tensors:
                zeros = unpacked_zeros(self.array(points), scales.shape[1], bits)
            bare = name.removesuffix(".weight")
            last = bare.rpartition(".")[2]
            start = 0
            for part in last.split("+"):
                stop = start + rows.get(part, len(codes))
                rows_of = slice(start, stop)
                points_of = None if zeros is None else zeros[rows_of]
                cut = QuantizedMatrix(codes[rows_of], scales[rows_of], bits, a["block_size"], a["K"], points_of)
                yield f"{bare.removesuffix(last)}{part}.weight", cut
                start = stop

    def vectors(self) -> dict[str, np.ndarray]:
        """Gains of the norms, float32 [hidden], under their checkpoint names."""
        return {name: self.array(name) for name in self.tensors if name.endswith("norm.weight")}
