"""What transformers computes, for tests that compare with it; without it they are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from kvq.exporter.rotation import head_rotation, rotate_inputs, rotate_outputs
from kvq.exporter.weights.quantize import QuantizedMatrix, unpacked_zeros
from kvq.runtime.bundle.bundle import Bundle
from tests.tools.packages import needs

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from kvq.exporter.reference import Twin


def reference_model(folder: Path) -> LlamaForCausalLM:
    """transformers' model of a checkpoint folder, float32."""
    torch, transformers = needs("torch"), needs("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def effective_model(bundle: Bundle) -> Twin:
    """The torch twin, with the weights that a bundle really has, float32."""
    needs("torch")
    from kvq.exporter import reference

    return reference.effective_model(bundle)


def logits_of(model: LlamaForCausalLM | Twin, ids: list[int] | np.ndarray) -> torch.Tensor:
    """A model's logits for ids, float32 [tokens, vocab]."""
    torch = needs("torch")
    with torch.inference_mode():
        return model(torch.as_tensor(ids)[None]).logits[0]


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' logits for ids, float32 [tokens, vocab]."""
    return logits_of(reference_model(folder), ids)


def in_transformers(bundle: Bundle, folder: Path) -> LlamaForCausalLM:
    """transformers' model of a checkpoint folder with the weights of its bundle, dequantized and un-rotated."""
    manifest = bundle.manifest
    tensors: dict[str, np.ndarray] = {}
    for name in [*manifest.segments, manifest.head]:
        graph = onnx.load(bundle.path / name, load_external_data=True).graph
        tensors |= _dequantized(graph, manifest.architecture.hidden)
    rotates, values_are = manifest.kv["rotation"] != "none", manifest.kv["values"]
    before, after = (
        head_rotation(manifest.architecture.head_dim, rotates and values_are in kinds)[1].T
        for kinds in (("folded",), ("folded", "half"))
    )
    torch, model = needs("torch"), reference_model(folder)
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name in state:
            state[name] = torch.as_tensor(tensor)
        elif "_proj" in name:  # several matrices, or their biases, in one
            layer, _, parts = name.removesuffix(".bias").rpartition(".")
            kind = "bias" if name.endswith(".bias") else "weight"
            for part in parts.split("+"):
                wanted = f"{layer}.{part}.{kind}"
                values, tensor = np.split(tensor, [len(state[wanted])])
                if part == "v_proj":
                    values = rotate_outputs(values, before)
                elif part == "o_proj" and kind == "weight":
                    values = rotate_inputs(values, after)
                state[wanted] = torch.as_tensor(values)
            assert not len(tensor), name
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _dequantized(graph: onnx.GraphProto, hidden: int) -> dict[str, np.ndarray]:
    """Constants of a graph by name; quantized matrices decoded."""
    found = {t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer}
    # Bits and row length of a product's codes; an embedding that is only looked up has no such node.
    products = {node.input[1]: {a.name: a.i for a in node.attribute} for node in graph.node if len(node.input) > 1}
    makers = {name: node for node in graph.node for name in node.output}
    for name in [name.removesuffix(".codes") for name in found if name.endswith(".codes")]:
        codes, scales = found.pop(f"{name}.codes"), found.pop(f"{name}.scales")
        of = {"bits": 8, "block_size": codes.shape[2], "K": hidden} | products.get(f"{name}.codes", {})
        zeros, offsets = found.pop(f"{name}.zeros", None), found.pop(f"{name}.offsets", None)
        zeros = None if zeros is None else unpacked_zeros(zeros, scales.shape[1], of["bits"])
        matrix = QuantizedMatrix(codes, scales, of["bits"], of["block_size"], of["K"], zeros, offsets)
        found[name] = matrix.dequantize()
        taken = next((makers.get(node.input[0]) for node in graph.node if f"{name}.codes" in node.input[1:2]), None)
        before = makers.get(taken.input[0]) if taken is not None and taken.op_type == "Reshape" else None
        # What it is multiplied with is rotated, block by block; unless these are values that are rotated as they come.
        if before is not None and before.op_type == "MatMul" and before.input[1] != "rotation":
            rotation = found[before.input[1]].astype(np.float64)
            found[name] = rotate_inputs(found[name].astype(np.float64), rotation).astype(np.float32)
    return found
