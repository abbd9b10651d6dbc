"""Random-weight checkpoints of the families that kvq exports: their configurations by transformers, ours their values.

`SMALL` has what distinguishes a family's layers in a narrow model, `REAL` the per-layer shape of a model that people
run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from kvq.exporter.architectures import ARCHITECTURES
from kvq.exporter.sources.base import Source
from tests.tools.checkpoints import small_tokenizer
from tests.tools.packages import needs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvq.runtime.session.model import Model


class Exported(NamedTuple):
    """A checkpoint, the fp32 bundle made from it and its model, and transformers' logits over a test's ids."""

    name: str
    folder: Path
    bundle: Path
    model: Model
    logits: np.ndarray


NARROW: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def longrope(pairs: int) -> dict[str, Any]:
    """Factors that are others for long texts than for short ones."""
    places = np.arange(pairs) / pairs
    short, long = (1 + 0.5 * places).round(4).tolist(), (1 + 20 * places**2).round(4).tolist()
    return {"type": "longrope", "short_factor": short, "long_factor": long}


# Of every family: model_type and fields.
SMALL: dict[str, dict[str, Any]] = {
    "llama-3.2": NARROW | {
        "model_type": "llama", "head_dim": 32, "rope_theta": 500000.0, "rope_scaling": LLAMA3,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    },
    "qwen2": NARROW | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "mistral": NARROW | {
        "model_type": "mistral", "head_dim": 32, "rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "granite": NARROW | {
        "model_type": "granite", "embedding_multiplier": 1.7, "residual_multiplier": 0.6, "logits_scaling": 1.3,
        "attention_multiplier": 0.09375, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 5e6,
    },
    "qwen3": NARROW | {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6, "tie_word_embeddings": True},
    "smollm3": NARROW | {
        "model_type": "smollm3", "num_hidden_layers": 5, "rope_theta": 5e6, "tie_word_embeddings": True,
    },
    "olmo2": NARROW | {"model_type": "olmo2", "rope_theta": 5e5, "tie_word_embeddings": False},
    "phi3": NARROW | {
        "model_type": "phi3", "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3,
        "num_key_value_heads": 1, "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "original_max_position_embeddings": 256, "tie_word_embeddings": True,
        "rope_scaling": longrope(12), "sliding_window": None,
    },
    "gemma3": NARROW | {
        "model_type": "gemma3_text", "head_dim": 256, "num_hidden_layers": 7, "num_key_value_heads": 1,
        "sliding_window": 256, "query_pre_attn_scalar": 256, "rope_theta": 1e6, "tie_word_embeddings": True,
    },
}  # fmt: skip
# What a reader who knew nothing of a family would take its fields for.
FEATURES: dict[str, dict[str, Any]] = {
    "llama-3.2": {"rope_scaling": None},
    "qwen2": {"rope_theta": 10000.0},
    "mistral": {"rope_theta": 10000.0},
    "granite": {
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 1.0,
    },
    "qwen3": {"rope_theta": 10000.0},
    "smollm3": {"no_rope_layers": [1, 1, 1, 1, 1]},
    "olmo2": {"rope_theta": 10000.0},
    "phi3": {"rope_scaling": None},
    "gemma3": {
        "rope_theta": 10000.0, "rope_local_base_freq": 1e6, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention"] * 7, "hidden_activation": "silu",
    },
}  # fmt: skip
# Published config.json files, but for layers and vocabulary.
REAL: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": SMALL["llama-3.2"] | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
    },
    "Qwen2.5-0.5B": SMALL["qwen2"] | {
        "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
    "Mistral-7B-v0.3": SMALL["mistral"] | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 32768,
    },
    "granite-3.3-2b": SMALL["granite"] | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "attention_multiplier": 0.015625, "rope_theta": 1e7,
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    },
    "Qwen3-0.6B": SMALL["qwen3"] | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
    },
    "SmolLM3-3B": SMALL["smollm3"] | {
        "num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 65536,
    },
    "OLMo-2-0425-1B": SMALL["olmo2"] | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
    },
    "Phi-4-mini": SMALL["phi3"] | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "rope_scaling": longrope(48),
    },
    "Phi-3.5-mini": SMALL["phi3"] | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "partial_rotary_factor": 1.0, "rope_scaling": longrope(48), "tie_word_embeddings": False,
    },
    "gemma-3-270m": SMALL["gemma3"] | {
        "hidden_size": 640, "intermediate_size": 2048, "max_position_embeddings": 32768, "sliding_window": 512,
    },
    "gemma-3-1b": SMALL["gemma3"] | {
        "num_hidden_layers": 6, "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "sliding_window": 512,
    },
}  # fmt: skip
# Layers that the published models have.
DEPTH = {
    "Llama-3.2-1B": 16, "Qwen2.5-0.5B": 24, "Mistral-7B-v0.3": 32, "granite-3.3-2b": 40, "Qwen3-0.6B": 28,
    "SmolLM3-3B": 36, "OLMo-2-0425-1B": 16, "Phi-4-mini": 32, "Phi-3.5-mini": 32, "gemma-3-270m": 18, "gemma-3-1b": 26,
}  # fmt: skip
# And tokens.
VOCABULARY = {
    "Llama-3.2-1B": 128256, "Qwen2.5-0.5B": 151936, "Mistral-7B-v0.3": 32768, "granite-3.3-2b": 49159,
    "Qwen3-0.6B": 151936, "SmolLM3-3B": 128256, "OLMo-2-0425-1B": 100352, "Phi-4-mini": 200064, "Phi-3.5-mini": 32064,
    "gemma-3-270m": 262144, "gemma-3-1b": 262144,
}  # fmt: skip


def family_model(folder: Path) -> PreTrainedModel:
    """transformers' model of a checkpoint folder, float32."""
    torch, transformers = needs("torch"), needs("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def family_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' logits for ids, float32 [tokens, vocab]."""
    torch = needs("torch")
    with torch.inference_mode():
        return family_model(folder)(torch.as_tensor(ids)[None]).logits[0].numpy()


def save_family(folder: Path, fields: dict[str, Any], *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Write a checkpoint as transformers does, its values as in `tests.tools.checkpoints.save_checkpoint`."""
    torch, transformers = needs("torch"), needs("transformers")
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    rng, deviation = np.random.default_rng(seed), fields["hidden_size"] ** -0.5
    for name, parameter in sorted(model.named_parameters()):
        with torch.no_grad():
            parameter.copy_(_values(name, parameter, deviation, rng, fields["model_type"] != "gemma3_text"))
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder)
    if tokenizer:
        small_tokenizer(min(512, fields["vocab_size"])).save(str(folder / "tokenizer.json"))
    return folder


def _values(name: str, parameter: torch.Tensor, deviation: float, rng: np.random.Generator, one: bool) -> torch.Tensor:
    torch = needs("torch")
    values = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
    if parameter.ndim > 1:
        return values * deviation * (2 if "embed" in name else 1)
    # Norms near one (some families add it themselves) and biases near zero, not at it: mistakes would not show.
    return values * 0.1 + float(name.endswith("norm.weight") and one)


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    return json.loads((folder / "config.json").read_text())


class _Named(Source):
    """A source of names alone: what a description of its configuration asks for."""

    shapes = read = tokenizer_json = chat_template = special_tokens = eos_token_ids = digest = None  # type: ignore[assignment]

    def __init__(self, fields: dict[str, Any]) -> None:
        self.config, self.name, self.path = fields, "named", Path()


def save_described(folder: Path, fields: dict[str, Any]) -> Path:
    """Write a checkpoint of what kvq's own description of a family asks for, without torch and a tokenizer."""
    parameters = ARCHITECTURES[fields["model_type"]].describe(_Named(fields)).parameters()
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: rng.standard_normal(shape, np.float32) / 8 for name, shape in parameters.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
