"""The weights of a bundle, read back: what other formats are made of, so that all arms run the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from kvq.bench.shapes import Assets
from kvq.exporter.weights.quantize import QuantizedMatrix
from kvq.runtime.bundle.manifest import MANIFEST, Manifest

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Product:
    """A quantized matrix of the bundle: its MatMulNBits attributes (K, N, bits, block_size, accuracy_level)."""

    name: str
    attributes: dict[str, int]


class BundleWeights:
    """Tensors of all segments and the head by name.

    Attributes:
        products: quantized matrices by name, such as ``model.layers.0.self_attn.q_proj+k_proj+v_proj``.
        tensors: references into the bundle's weights file, or small tensors themselves.
        manifest: of the bundle.
    """

    def __init__(self, made: Assets) -> None:
        self._folder = made.bundle
        self.manifest = Manifest.from_json((made.bundle / MANIFEST).read_text(encoding="utf-8"))
        self.products: dict[str, Product] = {}
        self.tensors: dict[str, TensorProto] = {}
        for file in [*self.manifest.segments, self.manifest.head]:
            graph = onnx.load(made.bundle / file, load_external_data=False).graph
            self.tensors |= {tensor.name: tensor for tensor in graph.initializer}
            for node in graph.node:
                if node.op_type == "MatMulNBits":
                    name = node.input[1].removesuffix(".codes")
                    self.products[name] = Product(name, {a.name: a.i for a in node.attribute})

    def array(self, name: str) -> np.ndarray:
        """A tensor's values."""
        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[name])
        return numpy_helper.to_array(tensor, str(self._folder))

    def matrix(self, name: str) -> QuantizedMatrix:
        """A quantized matrix [n, k]."""
        a = self.products[name].attributes
        return QuantizedMatrix(
            self.array(f"{name}.codes"), self.array(f"{name}.scales"), a["bits"], a["block_size"], a["K"]
        )

    def parts(self) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Matrices under the names of a Hugging Face checkpoint: products that share an input are cut apart."""
        shape = self.manifest.architecture
        rows = {
            "q_proj": shape.heads * shape.head_dim,
            "k_proj": shape.kv_heads * shape.head_dim,
            "v_proj": shape.kv_heads * shape.head_dim,
            "gate_proj": shape.ffn,
            "up_proj": shape.ffn,
        }
        for name in self.products:
            whole = self.matrix(name)
            prefix, _, last = name.rpartition(".")
            names = last.split("+")
            if len(names) == 1:
                yield name if last == "weight" else f"{name}.weight", whole
                continue
            start = 0
            for part in names:
                cut = slice(start, start + rows[part])
                yield f"{prefix}.{part}.weight", whole._replace(codes=whole.codes[cut], scales=whole.scales[cut])
                start = cut.stop

    def vectors(self) -> dict[str, np.ndarray]:
        """Gains of the norms, float32 [hidden], under their checkpoint names."""
        return {name: self.array(name) for name in self.tensors if name.endswith("norm.weight")}


def rotary_frequencies(fields: dict[str, Any]) -> np.ndarray:
    """Angles per position, float32 [head_dim // 2], for a config.json without rope scaling."""
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    return (1.0 / fields["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
