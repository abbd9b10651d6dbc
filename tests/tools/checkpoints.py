"""Random-weight checkpoints and small tokenizers for tests, saved as real Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from kvq.models.corpus import train_tokenizer
from kvq.models.family import config

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
# What transformers takes where a config.json says nothing; it writes all of it.
DEFAULTS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "dtype": "float32",
    "hidden_act": "silu",
    "mlp_bias": False,
    "model_type": "llama",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}


def small_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A byte-level tokenizer of at most `vocab_size` entries, trained on the story that this package's calibration text
    begins with: what models of random weights say depends on it, and tests on what they say.
    """
    from kvq.exporter.calibration import calibration_text

    story = calibration_text().partition("\n\nTallinn is")[0] + "\n"
    return train_tokenizer(iter([story]), vocab_size)


def shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a Llama by Hugging Face name; `fields` as in config.json, with none left out."""
    hidden, ffn, head_dim = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    q, kv = fields["num_attention_heads"] * head_dim, fields["num_key_value_heads"] * head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields["vocab_size"], hidden)}
    for layer in range(fields["num_hidden_layers"]):
        for part, products, biased in (
            ("self_attn", attention, fields["attention_bias"]), ("mlp", mlp, fields["mlp_bias"]),
        ):  # fmt: skip
            for name, shape in products.items():
                found[f"model.layers.{layer}.{part}.{name}.weight"] = shape
                if biased:
                    found[f"model.layers.{layer}.{part}.{name}.bias"] = shape[:1]
        found[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        found[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not fields["tie_word_embeddings"]:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def save_checkpoint(folder: Path, fields: dict[str, Any], *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Write the files of a checkpoint, with tokenizer.json if wanted; returns the folder.

    Matrices are Gaussian, with SmolLM's standard deviation: with transformers' 0.02 a narrow model attends to all
    tokens alike, and a mistake in the rotary embedding or in the mask would hardly show.
    """
    fields = DEFAULTS | {"head_dim": fields["hidden_size"] // fields["num_attention_heads"]} | fields
    deviation, rng = fields["hidden_size"] ** -0.5, np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(fields).items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:  # norms near one and biases near zero, not at it: mistakes in either would not show
            tensors[name] = np.float32(name.endswith("norm.weight")) + np.float32(0.1) * values
        else:
            tensors[name] = values * np.float32(deviation * (2 if "embed" in name else 1))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    ends = {name: fields[name] for name in ("bos_token_id", "eos_token_id") if name in fields}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
