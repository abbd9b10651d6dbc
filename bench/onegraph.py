"""The model as one ONNX graph with onnxruntime's own attention, from a bundle's weights.

The strongest conventional form on onnxruntime: GroupQueryAttention takes the stacked q, k, v as the
product yields them, applies the rotary embedding itself and appends to its cache in place; residual
sums and norms are one operator; the head computes the last token only. Tensors are
[1, tokens, features]. The graph refers to the bundle's weights file, so it holds the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kvq.bench.shapes import Assets
from kvq.bench.weights import EMBEDDING, BundleWeights, rotary_frequencies
from kvq.exporter.graphs.builder import CONTRIB, Graph
from kvq.exporter.weights.file import WeightFile

# Cache type and bytes per head vector by bits; 4 bits are two to a byte.
CACHE_TYPES = {32: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}


class _BundleFile(WeightFile):
    """Finds tensors in the bundle instead of writing them; what is not there goes into the graph."""

    def __init__(self, weights: BundleWeights) -> None:
        self._tensors = weights.tensors

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        return self._tensors.get(name) or numpy_helper.from_array(np.ascontiguousarray(array), name)


class OneGraph:
    """Builds the graph.

    Args:
        made: whose bundle to take the weights from.
        cache_bits: 32, 8 or 4.
        scales: float32 [layers, 2, kv_heads * head_dim], steps of the quantized cache's keys and values by channel.
        genai: inputs and outputs as onnxruntime-genai names them, instead of those of `OrtGqaArm`.
    """

    def __init__(self, made: Assets, cache_bits: int, scales: np.ndarray | None, genai: bool = False) -> None:
        self.weights = BundleWeights(made)
        self.shape = self.weights.manifest.architecture
        self.fields = made.fields
        self.cache_bits = cache_bits
        self.scales = scales
        self.genai = genai
        self.graph = Graph(f"gqa-{cache_bits}" if not genai else "model", _BundleFile(self.weights))

    def build(self, folder: Path) -> Path:
        """Write the graph into `folder`; returns the file."""
        graph, shape = self.graph, self.shape
        ids, lengths = self._inputs()
        rotary = self._rotary_tables()
        residual = self._embedding(ids)
        normed = graph.op(
            "SimplifiedLayerNormalization",
            residual,
            self._tensor("model.layers.0.input_layernorm.weight"),
            axis=-1,
            epsilon=self.fields["rms_norm_eps"],
            stash_type=1,
        )
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}"
            qkv = self._product(normed, f"{prefix}.self_attn.q_proj+k_proj+v_proj")
            attention = self._attention(layer, qkv, lengths, rotary)
            output = self._product(attention, f"{prefix}.self_attn.o_proj")
            normed, residual = self._add_norm(output, residual, f"{prefix}.post_attention_layernorm.weight")
            gate, up = graph.split(self._product(normed, f"{prefix}.mlp.gate_proj+up_proj"), [shape.ffn, shape.ffn])
            inner = graph.op("Mul", graph.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
            down = self._product(inner, f"{prefix}.mlp.down_proj")
            following = f"model.layers.{layer + 1}.input_layernorm.weight"
            normed, residual = self._add_norm(
                down, residual, following if layer + 1 < shape.layers else "model.norm.weight"
            )
        last = graph.op("Slice", normed, graph.constant([-1]), graph.constant([2**31]), graph.constant([1]))
        self._product(last, EMBEDDING, output="logits")
        graph.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, shape.vocab]))
        return folder / graph.save(folder)

    def _inputs(self) -> tuple[str, tuple[str, str]]:
        """Token ids [1, tokens]; cached and total lengths as GroupQueryAttention wants them."""
        graph, integer = self.graph, TensorProto.INT32
        if not self.genai:
            ids = graph.input("ids", 1, "tokens", dtype=TensorProto.INT64)
            return ids, (graph.input("seqlens_k", 1, dtype=integer), graph.input("total", dtype=integer))
        ids = graph.input("input_ids", "batch", "tokens", dtype=TensorProto.INT64)
        mask = graph.input("attention_mask", "batch", "total", dtype=TensorProto.INT64)
        count = graph.op("ReduceSum", mask, graph.constant([1]), keepdims=0)
        before = graph.op("Cast", graph.op("Sub", count, graph.constant([1])), to=integer)
        total = graph.op("Gather", graph.op("Shape", mask), graph.constant(1), axis=0)
        return ids, (before, graph.op("Cast", total, to=integer))

    def _tensor(self, name: str) -> str:
        self.graph.initializers[name] = self.weights.tensors[name]
        return name

    def _rotary_tables(self) -> tuple[str, str]:
        """Cosine and sine of all positions, [context, head_dim // 2]."""
        angles = np.outer(np.arange(self.shape.context), rotary_frequencies(self.fields)).astype(np.float32)
        return self.graph.weight("cosine", np.cos(angles)), self.graph.weight("sine", np.sin(angles))

    def _embedding(self, ids: str) -> str:
        """Rows of the 8-bit table, decoded: [1, tokens, hidden]."""
        graph, hidden = self.graph, self.shape.hidden
        codes = graph.op("Gather", self._tensor(f"{EMBEDDING}.codes"), ids)
        scales = graph.op("Gather", self._tensor(f"{EMBEDDING}.scales"), ids)
        centred = graph.op("Sub", graph.op("Cast", codes, to=TensorProto.FLOAT), graph.constant(128.0, np.float32))
        rows = graph.op("Mul", centred, graph.op("Unsqueeze", scales, graph.constant([3])))
        return graph.op("Reshape", rows, graph.constant([0, 0, hidden]))

    def _product(self, x: str, name: str, output: str | None = None) -> str:
        inputs = (x, self._tensor(f"{name}.codes"), self._tensor(f"{name}.scales"))
        attributes = self.weights.products[name].attributes
        return self.graph.op("MatMulNBits", *inputs, output=output, domain=CONTRIB, **attributes)

    def _add_norm(self, x: str, residual: str, gain: str) -> tuple[str, str]:
        """(norm(x + residual), x + residual) in one operator."""
        names = [f"normed_{len(self.graph.nodes)}", f"residual_{len(self.graph.nodes)}"]
        self.graph.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [residual, x, self._tensor(gain)],
                [names[0], "", "", names[1]],
                domain=CONTRIB,
                epsilon=self.fields["rms_norm_eps"],
            )
        )
        return names[0], names[1]

    def _attention(self, layer: int, qkv: str, lengths: tuple[str, str], rotary: tuple[str, str]) -> str:
        """GroupQueryAttention over the packed projections and the layer's cache."""
        graph, shape, kind = self.graph, self.shape, CACHE_TYPES[self.cache_bits]
        packed = shape.head_dim // 2 if self.cache_bits == 4 else shape.head_dim
        past, present = cache_names(layer, self.genai)
        batch = "batch" if self.genai else 1
        for name in past:
            graph.input(name, batch, shape.kv_heads, "past", packed, dtype=kind)
        for name in present:
            info = helper.make_tensor_value_info(name, kind, [batch, shape.kv_heads, "present", packed])
            graph.outputs.append(info)
        inputs = [qkv, "", "", *past, *lengths, *rotary]
        attributes: dict[str, Any] = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "do_rotary": 1,
        }
        if self.scales is not None:
            names = [graph.weight(f"cache_{x}_{layer}", self.scales[layer, i]) for i, x in enumerate("kv")]
            inputs += ["", "", "", *names]
            attributes |= {
                "kv_cache_bit_width": self.cache_bits,
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
            }
        out = f"attention_{layer}"
        graph.nodes.append(
            helper.make_node("GroupQueryAttention", inputs, [out, *present], domain=CONTRIB, **attributes)
        )
        return out


def cache_names(layer: int, genai: bool = False) -> tuple[list[str], list[str]]:
    """Names of a layer's cache inputs and outputs, keys first."""
    if genai:
        return [f"past_key_values.{layer}.{x}" for x in ("key", "value")], [
            f"present.{layer}.{x}" for x in ("key", "value")
        ]
    return [f"past_{x}_{layer}" for x in "kv"], [f"present_{x}_{layer}" for x in "kv"]


def cache_scales(made: Assets, bits: int, tokens: int = 512) -> np.ndarray:
    """Steps that the largest key and value of each channel fit into, measured on random tokens.

    Returns:
        float32 [layers, 2, kv_heads * head_dim].
    """
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, made.fields["vocab_size"], (1, tokens)))
    with torch.inference_mode():
        cache = model.model(ids, use_cache=True).past_key_values
    largest = [[x[0].abs().amax(dim=1).reshape(-1) for x in (layer.keys, layer.values)] for layer in cache.layers]
    return torch.stack([torch.stack(pair) for pair in largest]).numpy() / (2 ** (bits - 1) - 1)
