"""What a bundle really computes, as a Hugging Face model.

Quantization changes the weights and rotation moves them around. Undoing the second but not the
first gives the transformers model that the bundle must agree with, up to rounding: the
reference for tests and for training a controller on the weights that will run. Everything is
read back from the graphs, so no checkpoint is needed.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from kvq.exporter.architectures.llama import EMBEDDING, HEAD
from kvq.exporter.quantize import QuantizedMatrix
from kvq.exporter.rotation import head_rotation, rotate_inputs, rotate_outputs
from kvq.runtime.bundle.bundle import Bundle


def effective_model(bundle: Bundle) -> LlamaForCausalLM:
    """transformers' model with the bundle's dequantized, un-rotated weights, in float32."""
    manifest, shape = bundle.manifest, bundle.manifest.architecture
    tensors: dict[str, np.ndarray] = {}
    for name in [*manifest.segments, manifest.head]:
        tensors |= _tensors(_graph(bundle, name), shape.hidden)
    head, first = _graph(bundle, manifest.head), _graph(bundle, manifest.segments[0])
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=_attribute(head, "SimplifiedLayerNormalization", "epsilon"),
        tie_word_embeddings=HEAD not in tensors,
        attention_bias=any(name.endswith("o_proj.bias") for name in tensors),
        mlp_bias=any(name.endswith("down_proj.bias") for name in tensors),
    )
    model = LlamaForCausalLM(config).eval()
    rotary = model.model.rotary_emb
    frequencies, rotary.attention_scaling = _rotary(first)
    rotary.inv_freq = rotary.original_inv_freq = torch.from_numpy(frequencies)
    rotated = manifest.kv["rotation"] != "none" and manifest.kv.get("values", "folded") == "folded"
    rotation = head_rotation(shape.head_dim, rotated)[1] if rotated else np.eye(shape.head_dim, dtype=np.float32)
    state = {name: parameter.detach() for name, parameter in model.state_dict().items()}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        kind = last if last == "bias" else "weight"
        parts = (prefix.rpartition(".")[2] if last == "bias" else last).split("+")
        if not parts[0].endswith("_proj"):
            if name in state:
                state[name] = torch.as_tensor(np.array(tensor))
            continue
        layer = prefix.rpartition(".")[0] if last == "bias" else prefix
        sizes = [len(state[f"{layer}.{part}.weight"]) for part in parts]
        for part, values in zip(parts, np.split(tensor, np.cumsum(sizes)[:-1]), strict=True):
            if part == "v_proj":
                values = rotate_outputs(values, rotation.T)
            elif part == "o_proj" and kind == "weight":
                values = rotate_inputs(values, rotation.T)
            state[f"{layer}.{part}.{kind}"] = torch.as_tensor(np.array(values))
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state)
    return model


def stored_mean_keys(bundle: Bundle) -> np.ndarray:
    """The vectors that a bundle's segments subtract from rotated keys, float32 [layers, kv_heads, head_dim]."""
    shape = bundle.manifest.architecture
    means = np.zeros((shape.layers, shape.kv_heads, shape.head_dim), np.float32)
    for layer, name in enumerate(bundle.manifest.segments[: shape.layers]):
        found = _tensors(_graph(bundle, name), shape.hidden).get(f"model.layers.{layer}.mean_keys")
        if found is not None:  # zero means are left out of the graph
            means[layer] = found[shape.heads :]
    return means


def _graph(bundle: Bundle, name: str) -> onnx.GraphProto:
    return onnx.load(bundle.path / name, load_external_data=True).graph


def _attribute(graph: onnx.GraphProto, kind: str, name: str) -> float:
    """An attribute of the first node of a kind."""
    node = next(node for node in graph.node if node.op_type == kind)
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def _rotary(segment: onnx.GraphProto) -> tuple[np.ndarray, float]:
    """Frequencies float32 [head_dim // 2] and the factor on cosine and sine, from the first segment."""
    constants = {t.name: t for t in segment.initializer}
    producer = {output: node for node in segment.node for output in node.output}
    cosine = next(node for node in segment.node if node.op_type == "Cos")
    factors = [node.input[1] for node in segment.node if node.op_type == "Mul" and node.input[0] == cosine.output[0]]
    frequencies = numpy_helper.to_array(constants[producer[cosine.input[0]].input[1]])
    scale = float(numpy_helper.to_array(constants[factors[0]])) if factors else 1.0
    return np.array(frequencies, np.float32).ravel(), scale


def _tensors(graph: onnx.GraphProto, hidden: int) -> dict[str, np.ndarray]:
    """Weights of one graph by name, float32; quantized ones decoded."""
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    # Bits and row length of a product's codes; an embedding that is only looked up has no such node.
    products = {
        node.input[1]: {attribute.name: attribute.i for attribute in node.attribute}
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    for codes_name in [name for name in found if name.endswith(".codes")]:
        name = codes_name.removesuffix(".codes")
        codes, scales = found.pop(codes_name), found.pop(f"{name}.scales")
        product = products.get(codes_name, {"bits": 8, "block_size": codes.shape[2], "K": hidden})
        matrix = QuantizedMatrix(codes, scales, product["bits"], product["block_size"], product["K"])
        found[name] = matrix.dequantize()
    return found
