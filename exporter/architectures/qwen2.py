"""Qwen2 and Qwen2.5 (arXiv 2407.10671): queries, keys and values have biases."""

from __future__ import annotations

from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.parts import Parts, gguf
from kvq.exporter.architectures.windows import without_later_windows
from kvq.exporter.sources.base import Source


def qwen2(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts, notes = without_later_windows(Parts.of(source, max_position_embeddings=32768))
    layers = [parts.pre_norm(i, parts.attend(i, bias=True), parts.mlp(i)) for i in range(parts.shape.layers)]
    return parts.model(layers, notes=notes)


ARCHITECTURES = {"qwen2": Family(qwen2, gguf("qwen2"))}
