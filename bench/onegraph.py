"""The model as one ONNX graph with onnxruntime's own attention, from a bundle's weights.

The strongest conventional form on onnxruntime: GroupQueryAttention takes the stacked q, k, v as the product yields
them, applies the rotary embedding itself and appends to its cache in place; residual sums and norms are one operator;
the head computes the last token only. Tensors are [1, tokens, features]. The graph refers to the bundle's weights file,
so it holds the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kvq.bench.shapes import Assets
from kvq.bench.weights import EMBEDDING, BundleWeights
from kvq.exporter.graphs.builder import CONTRIB, Graph
from kvq.exporter.weights.file import WeightFile

# Cache type and values per element by bits.
CACHE_TYPES = {32: (TensorProto.FLOAT, 1), 8: (TensorProto.INT8, 1), 4: (TensorProto.UINT8, 2)}


class _BundleFile(WeightFile):
    """Finds tensors in the bundle instead of writing them; what is not there goes into the graph."""

    def __init__(self, weights: BundleWeights) -> None:
        self._tensors = weights.tensors

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        return self._tensors.get(name) or numpy_helper.from_array(np.ascontiguousarray(array), name)


class OneGraph:
    """Builds the graph.

    Inputs: ids int64 [1, tokens]; seqlens_k int32 [1, 1], tokens in the cache afterwards less one; total int32 [1],
    tokens in the cache afterwards; past_k_0, past_v_0 and so on [1, kv_heads, capacity, width]. Outputs: logits float32
    [1, 1, vocab] of the last token; present_k_0 and so on.

    Args:
        made: whose bundle to take the weights from.
        cache_bits: 32, 8 or 4.
        scales: float32 [layers, 2, kv_heads * head_dim], steps of the quantized cache's keys and values by channel.
    """

    def __init__(self, made: Assets, cache_bits: int, scales: np.ndarray | None) -> None:
        self.weights = BundleWeights(made)
        self.shape = self.weights.shape
        self.fields = made.fields
        self.cache_bits = cache_bits
        self.scales = scales
        self.graph = Graph(f"gqa-{cache_bits}", _BundleFile(self.weights))

    def build(self, folder: Path) -> Path:
        """Write the graph into `folder`; returns the file."""
        graph, shape, integer = self.graph, self.shape, TensorProto.INT32
        ids = graph.input("ids", 1, "tokens", dtype=TensorProto.INT64)
        lengths = [graph.input("seqlens_k", 1, 1, dtype=integer), graph.input("total", 1, dtype=integer)]
        exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
        frequencies = (1.0 / self.fields["rope_theta"] ** exponents).astype(np.float32)
        angles = np.outer(np.arange(shape.context), frequencies).astype(np.float32)  # [context, head_dim // 2]
        places = [*lengths, graph.weight("cosine", np.cos(angles)), graph.weight("sine", np.sin(angles))]
        residual = self._embedding(ids)
        gain, epsilon = graph.stored("model.layers.0.input_layernorm.weight"), self.fields["rms_norm_eps"]
        normed = graph.op("SimplifiedLayerNormalization", residual, gain, axis=-1, epsilon=epsilon, stash_type=1)
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}"
            qkv = self._product(normed, f"{prefix}.self_attn.q_proj+k_proj+v_proj")
            output = self._product(self._attention(layer, qkv, places), f"{prefix}.self_attn.o_proj")
            normed, residual = self._add_norm(output, residual, f"{prefix}.post_attention_layernorm.weight")
            gate, up = graph.split(self._product(normed, f"{prefix}.mlp.gate_proj+up_proj"), [shape.ffn, shape.ffn])
            inner = graph.op("Mul", graph.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
            down = self._product(inner, f"{prefix}.mlp.down_proj")
            last = layer + 1 == shape.layers
            following = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
            normed, residual = self._add_norm(down, residual, following)
        newest = graph.op("Slice", normed, graph.constant([-1]), graph.constant([2**31]), graph.constant([1]))
        self._product(newest, EMBEDDING, output="logits")
        graph.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, shape.vocab]))
        return folder / graph.save(folder)

    def _embedding(self, ids: str) -> str:
        """Rows of the 8-bit table, decoded: [1, tokens, hidden]."""
        graph = self.graph
        codes, scales = (graph.op("Gather", graph.stored(f"{EMBEDDING}.{part}"), ids) for part in ("codes", "scales"))
        centred = graph.op("Sub", graph.op("Cast", codes, to=TensorProto.FLOAT), graph.constant(128.0, np.float32))
        rows = graph.op("Mul", centred, graph.op("Unsqueeze", scales, graph.constant([3])))
        return graph.op("Reshape", rows, graph.constant([0, 0, self.shape.hidden]))

    def _product(self, x: str, name: str, output: str | None = None) -> str:
        parts = [f"{name}.{part}" for part in ("codes", "scales", "zeros")]
        inputs = (x, *(self.graph.stored(part) for part in parts if part in self.weights.tensors))
        return self.graph.op("MatMulNBits", *inputs, output=output, domain=CONTRIB, **self.weights.products[name])

    def _contrib(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """A node of onnxruntime's own with several outputs."""
        self.graph.nodes.append(helper.make_node(operator, inputs, outputs, domain=CONTRIB, **attributes))

    def _add_norm(self, x: str, residual: str, gain: str) -> tuple[str, str]:
        """(norm(x + residual), x + residual) in one operator."""
        normed, total = f"normed_{len(self.graph.nodes)}", f"residual_{len(self.graph.nodes)}"
        inputs, outputs = [residual, x, self.graph.stored(gain)], [normed, "", "", total]
        self._contrib("SkipSimplifiedLayerNormalization", inputs, outputs, epsilon=self.fields["rms_norm_eps"])
        return normed, total

    def _attention(self, layer: int, qkv: str, places: list[str]) -> str:
        """GroupQueryAttention over the packed projections and the layer's cache."""
        graph, shape, (kind, values) = self.graph, self.shape, CACHE_TYPES[self.cache_bits]
        width = shape.head_dim // values
        past = [graph.input(f"past_{x}_{layer}", 1, shape.kv_heads, "past", width, dtype=kind) for x in "kv"]
        present = [f"present_{x}_{layer}" for x in "kv"]
        size: list[Any] = [1, shape.kv_heads, "present", width]
        graph.outputs += [helper.make_tensor_value_info(name, kind, size) for name in present]
        inputs = [qkv, "", "", *past, *places]
        attributes: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "do_rotary": 1}
        if self.scales is not None:
            inputs += ["", "", ""]
            inputs += [graph.weight(f"cache_{x}_{layer}", self.scales[layer, i]) for i, x in enumerate("kv")]
            attributes |= {f"{x}_quant_type": "PER_CHANNEL" for x in "kv"} | {"kv_cache_bit_width": self.cache_bits}
        out = f"attention_{layer}"
        self._contrib("GroupQueryAttention", inputs, [out, *present], **attributes)
        return out


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
