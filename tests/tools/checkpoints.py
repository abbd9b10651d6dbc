"""Random-weight checkpoints and small tokenizers for tests, saved as real Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

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
