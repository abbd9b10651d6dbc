"""SmolLM3 (Hugging Face): Llama's layers, some of them without rotary embedding."""

from __future__ import annotations

from typing import Any

from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.parts import Parts, gguf
from kvq.exporter.architectures.windows import windows
from kvq.exporter.sources.base import Source, positive
from kvq.runtime.errors import CheckpointError

# Every so many layers one goes without, unless a configuration says more: transformers' and llama.cpp's default.
INTERVAL = 4
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True,
}  # fmt: skip


def smollm3(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source, **DEFAULTS)
    rotating = _rotating(parts)
    # As transformers has it, the layers without rotary embedding have one, if any.
    local = [parts.says("use_sliding_window") and not rotates for rotates in rotating]
    sees = windows(parts, unlisted=local) if any(local) else [0] * parts.shape.layers
    biased = parts.says("attention_bias")
    layers = []
    for i, rotates in enumerate(rotating):
        attend = parts.attend(i, bias=biased, output_bias=biased, rotary=0 if rotates else None, window=sees[i])
        layers.append(parts.pre_norm(i, attend, parts.mlp(i, parts.says("mlp_bias"))))
    rotaries = (parts.rotary("no_rope_layers", "no_rope_layer_interval"),)
    return parts.model(layers, rotaries)


def _rotating(parts: Parts) -> list[bool]:
    """Whether each layer has a rotary embedding.

    Raises:
        CheckpointError: the configuration does not say it of every layer, or says something else.
    """
    listed, layers = parts.config.get("no_rope_layers"), parts.shape.layers
    if listed is None:
        interval = parts.config.get("no_rope_layer_interval", INTERVAL)
        positive(interval, f"config.json of {parts.name} has no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or any(flag not in (0, 1) for flag in listed):
        raise CheckpointError(
            f"config.json of {parts.name} has no_rope_layers={listed!r:.60}; fix it: it must be 0 or 1 for each of"
            f" {layers} layers"
        )
    return [flag == 1 for flag in listed[:layers]]


ARCHITECTURES = {"smollm3": Family(smollm3, gguf("smollm3", interleaved=True))}
