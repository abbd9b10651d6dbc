"""Mistral (arXiv 2310.06825): Llama's layers. GGUF files hold it as Llama, without its window."""

from __future__ import annotations

from typing import Any

from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.parts import Parts
from kvq.exporter.architectures.windows import windows
from kvq.exporter.sources.base import Source

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def mistral(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source, **DEFAULTS)
    sees = windows(parts)
    return parts.model([parts.pre_norm(i, parts.attend(i, window=sees[i]), parts.mlp(i)) for i in range(len(sees))])


ARCHITECTURES = {"mistral": Family(mistral)}
