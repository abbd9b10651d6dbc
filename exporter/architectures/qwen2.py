"""Qwen2 and Qwen2.5 (arXiv 2407.10671): queries, keys and values have biases."""

from __future__ import annotations

from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.parts import Parts, gguf
from kvq.exporter.architectures.windows import later_windows
from kvq.exporter.sources.base import Source


def qwen2(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source, max_position_embeddings=32768)
    sees = later_windows(parts)
    attends = [parts.attend(i, bias=True, window=window) for i, window in enumerate(sees)]
    return parts.model([parts.pre_norm(i, attend, parts.mlp(i)) for i, attend in enumerate(attends)])


ARCHITECTURES = {"qwen2": Family(qwen2, gguf("qwen2"))}
