"""Qwen3 (arXiv 2505.09388): a norm of every head of queries and keys, and no biases."""

from __future__ import annotations

from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.parts import HEAD_NORMS, LAYER, Parts, gguf
from kvq.exporter.architectures.windows import later_windows
from kvq.exporter.sources.base import Source


def qwen3(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source, max_position_embeddings=32768, head_dim=128)
    biased, head_dim = parts.says("attention_bias"), parts.shape.head_dim
    layers = []
    for i, window in enumerate(later_windows(parts)):
        norms = parts.norm(i, "self_attn.q_norm", head_dim), parts.norm(i, "self_attn.k_norm", head_dim)
        attend = parts.attend(i, bias=biased, output_bias=biased, norms=norms, window=window)
        layers.append(parts.pre_norm(i, attend, parts.mlp(i)))
    return parts.model(layers)


ARCHITECTURES = {"qwen3": Family(qwen3, gguf("qwen3", layer=LAYER | HEAD_NORMS))}
