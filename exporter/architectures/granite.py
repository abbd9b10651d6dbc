"""Granite 3 (IBM): Llama's layers, and multipliers of embedding, attention, residual and logits.

All but the embedding's stand in the weights here. The embedding's table may be that of the head, which has none.
"""

from __future__ import annotations

import math

from kvq.exporter.architectures.description import Adapted, Family, Model
from kvq.exporter.architectures.parts import FINAL_NORM, Parts, gguf, scaled
from kvq.exporter.sources.base import Source


def granite(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source)
    biased, layers = parts.says("attention_bias"), range(parts.shape.layers)
    # Defaults are those of transformers' GraniteConfig. Attention divides by the root of head_dim itself.
    attention = parts.number("attention_multiplier", 1.0) * math.sqrt(parts.shape.head_dim)
    adapted = {FINAL_NORM: Adapted(1 / parts.number("logits_scaling", 1.0))}
    for i in layers:
        attends = f"model.layers.{i}.self_attn"
        adapted |= scaled(attention, f"{attends}.q_proj")
        adapted |= scaled(
            parts.number("residual_multiplier", 1.0), f"{attends}.o_proj", f"model.layers.{i}.mlp.down_proj"
        )
    return parts.model(
        [
            parts.pre_norm(i, parts.attend(i, bias=biased, output_bias=biased), parts.mlp(i, parts.says("mlp_bias")))
            for i in layers
        ],
        adapted=adapted,
        embedding_scale=parts.number("embedding_multiplier", 1.0),
    )


GGUF = gguf(
    "granite",
    interleaved=True,
    numbers={
        "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    },
)  # fmt: skip
ARCHITECTURES = {"granite": Family(granite, GGUF)}
