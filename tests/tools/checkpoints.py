"""Random-weight checkpoints and small tokenizers for tests, saved as real Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from kvq.exporter.rotation import head_rotation, rotate_inputs, rotate_outputs
from kvq.exporter.weights.quantize import QuantizedMatrix
from kvq.models.corpus import train_tokenizer
from kvq.models.family import config
from kvq.runtime.bundle.bundle import Bundle

# Odd in every respect: head_dim 8, ungrouped and grouped heads, ffn no multiple of a block.
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def small_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A byte-level tokenizer of at most `vocab_size` entries, trained on this package's calibration text."""
    from kvq.exporter.calibration import calibration_text

    return train_tokenizer(iter([calibration_text()]), vocab_size)


def save_checkpoint(folder: Path, fields: dict[str, Any], *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Write config.json, model.safetensors and (if wanted) tokenizer.json; returns the folder."""
    torch.manual_seed(seed)
    # SmolLM's own initialisation. With transformers' default of 0.02 a narrow model attends to all
    # tokens alike, and a mistake in the rotary embedding or in the mask would hardly show.
    fields = {"initializer_range": fields["hidden_size"] ** -0.5} | fields
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    # transformers initialises norms to one and biases to zero: mistakes in either would not show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.mul_(2.0)
    model.save_pretrained(folder)
    if tokenizer:
        small_tokenizer(min(512, fields["vocab_size"])).save(str(folder / "tokenizer.json"))
    return folder


def family_checkpoint(folder: Path, name: str, *, layers: int = 2, vocab: int = 2048) -> Path:
    """A checkpoint in the per-layer shape of a SmolLM, with fewer layers and a smaller vocabulary."""
    return save_checkpoint(folder, config(name, num_hidden_layers=layers, vocab_size=vocab))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of config.json in place."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' logits for ids, float32 [tokens, vocab]."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def in_transformers(bundle: Bundle, folder: Path) -> LlamaForCausalLM:
    """transformers' model of a checkpoint folder with the weights of its bundle, dequantized and un-rotated."""
    manifest = bundle.manifest
    tensors: dict[str, np.ndarray] = {}
    for name in [*manifest.segments, manifest.head]:
        graph = onnx.load(bundle.path / name, load_external_data=True).graph
        tensors |= _dequantized(graph, manifest.architecture.hidden)
    rotated = manifest.kv["rotation"] != "none" and manifest.kv["values"] == "folded"
    back = head_rotation(manifest.architecture.head_dim, rotated)[1].T
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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
                    values = rotate_outputs(values, back)
                elif part == "o_proj" and kind == "weight":
                    values = rotate_inputs(values, back)
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
    for name in [name.removesuffix(".codes") for name in found if name.endswith(".codes")]:
        codes, scales = found.pop(f"{name}.codes"), found.pop(f"{name}.scales")
        of = {"bits": 8, "block_size": codes.shape[2], "K": hidden} | products.get(f"{name}.codes", {})
        found[name] = QuantizedMatrix(codes, scales, of["bits"], of["block_size"], of["K"]).dequantize()
    return found
