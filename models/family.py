"""The SmolLM family: shapes of the published checkpoints and of the embedded default model.

Each entry holds the fields of a Hugging Face ``config.json`` that set the shape; the rest is
shared. Source: config.json of HuggingFaceTB/SmolLM-* and SmolLM2-*.
"""

from __future__ import annotations

from typing import Any

SHARED: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _shape(hidden, ffn, layers, heads, kv_heads, *, vocab=49152, context=2048, theta=10000.0) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rope_theta": theta,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "smollm-135m": _shape(576, 1536, 30, 9, 3),
    "smollm-360m": _shape(960, 2560, 32, 15, 5),
    "smollm-1.7b": _shape(2048, 8192, 24, 32, 32),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, context=8192, theta=100000.0),
    "smollm2-360m": _shape(960, 2560, 32, 15, 5, context=8192, theta=100000.0),
    "smollm2-1.7b": _shape(2048, 8192, 24, 32, 32, context=8192, theta=130000.0),
    # The embedded default model: 12.6 M parameters, trained by models/train.py.
    "kvq-books": _shape(384, 1024, 6, 6, 2, vocab=8192),
}


def config(name: str, **overrides: Any) -> dict[str, Any]:
    """The config.json fields of a family member, e.g. ``config("smollm-135m", num_hidden_layers=2)``.

    Raises:
        KeyError: the name is not in `SHAPES`; the message lists the names.
    """
    if name not in SHAPES:
        raise KeyError(f"unknown model shape {name!r}; one of {', '.join(SHAPES)}")
    return {**SHARED, **SHAPES[name], **overrides}
