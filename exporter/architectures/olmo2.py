"""OLMo 2 (arXiv 2501.00656): norms behind attention and network, and of all queries and all keys together."""

from __future__ import annotations

from kvq.exporter.architectures.description import Add, Family, Layer, Model
from kvq.exporter.architectures.parts import HEAD_NORMS, LAYER, ONLY, Parts, gguf
from kvq.exporter.sources.base import Source


def olmo2(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    only = {**ONLY, "sliding_window": None}  # that of OLMo 3, which GGUF files call olmo2 too
    parts = Parts.of(source, only, rms_norm_eps=1e-5)
    biased, shape = parts.says("attention_bias"), parts.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers = []
    for i in range(shape.layers):
        norms = parts.norm(i, "self_attn.q_norm", queries), parts.norm(i, "self_attn.k_norm", keys)
        attend = parts.attend(i, bias=biased, output_bias=biased, norms=norms)
        first, second = (parts.norm(i, f"post_{part}_layernorm") for part in ("attention", "feedforward"))
        layers.append(Layer.of(attend, first, Add(), *parts.mlp(i), second, Add()))
    return parts.model(layers)


GGUF_LAYER = {name: ours for name, ours in LAYER.items() if not name.endswith("norm")} | HEAD_NORMS
GGUF_LAYER |= {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
ARCHITECTURES = {"olmo2": Family(olmo2, gguf("olmo2", layer=GGUF_LAYER))}
