"""The Llama architecture (Touvron et al., arXiv 2302.13971), which SmolLM, SmolLM2 and Llama 3 have too."""

from __future__ import annotations

from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.parts import Parts, gguf
from kvq.exporter.sources.base import Source


def llama(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source)
    biased = parts.says("attention_bias")
    return parts.model(
        [
            parts.pre_norm(i, parts.attend(i, bias=biased, output_bias=biased), parts.mlp(i, parts.says("mlp_bias")))
            for i in range(parts.shape.layers)
        ]
    )


GGUF = gguf("llama", interleaved=True)
ARCHITECTURES = {"llama": Family(llama, GGUF)}
