"""What a bundle really computes, as a Hugging Face state dict.

Quantization changes the weights and rotation moves them around. Undoing the second but not the
first gives the transformers model that the bundle must agree with, up to rounding: the
reference for tests and for training a controller on the weights that will run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import LlamaForCausalLM

from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.quantize import QuantizedMatrix
from kvq.exporter.rotation import head_rotation, rotate_inputs, rotate_outputs
from kvq.runtime.bundle import Bundle


def effective_model(bundle: Bundle, checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The checkpoint's model with the bundle's dequantized, un-rotated weights, in float32.

    Args:
        bundle: made from `checkpoint`.
        checkpoint: gives the configuration; its model is not changed.
    """
    manifest, shape = bundle.manifest, bundle.manifest.architecture
    tensors: dict[str, np.ndarray] = {}
    for name in [*manifest.segments, manifest.head]:
        tensors |= _tensors(bundle.path / name, shape.hidden)
    rotation = head_rotation(shape.head_dim, manifest.kv["rotation"] != "none")[1]
    state = {name: tensor.numpy() for name, tensor in checkpoint.model.state_dict().items()}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        parts = last.split("+")
        if not parts[0].endswith("_proj"):
            if name in state:
                state[name] = tensor
            continue
        sizes = [len(state[f"{prefix}.{part}.weight"]) for part in parts]
        for part, weight in zip(parts, np.split(tensor, np.cumsum(sizes)[:-1]), strict=True):
            if part == "v_proj":
                weight = rotate_outputs(weight, rotation.T)
            elif part == "o_proj":
                weight = rotate_inputs(weight, rotation.T)
            state[f"{prefix}.{part}.weight"] = weight
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(checkpoint.config).eval()
    model.load_state_dict({k: torch.as_tensor(np.array(v)) for k, v in state.items()})
    return model


def stored_mean_keys(bundle: Bundle) -> np.ndarray:
    """The vectors that a bundle's segments subtract from rotated keys, float32 [layers, kv_heads, head_dim]."""
    shape = bundle.manifest.architecture
    means = np.zeros((shape.layers, shape.kv_heads, shape.head_dim), np.float32)
    for layer, name in enumerate(bundle.manifest.segments[: shape.layers]):
        found = _tensors(bundle.path / name, shape.hidden).get(f"model.layers.{layer}.mean_keys")
        if found is not None:  # zero means are left out of the graph
            means[layer] = found[shape.heads :]
    return means


def _tensors(file: Path, hidden: int) -> dict[str, np.ndarray]:
    """Weights of one graph by name, float32; quantized ones decoded."""
    model = onnx.load(file, load_external_data=True)
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    # Bits and row length of a product's codes; an embedding that is only looked up has no such node.
    products = {
        node.input[1]: {attribute.name: attribute.i for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    for codes_name in [name for name in found if name.endswith(".codes")]:
        name = codes_name.removesuffix(".codes")
        codes, scales = found.pop(codes_name), found.pop(f"{name}.scales")
        product = products.get(codes_name, {"bits": 8, "block_size": codes.shape[2], "K": hidden})
        matrix = QuantizedMatrix(codes, scales, product["bits"], product["block_size"], product["K"])
        found[name] = matrix.dequantize()
    return found
