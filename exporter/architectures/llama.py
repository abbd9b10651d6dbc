"""The Llama architecture: what a config.json means, and which parameters a checkpoint must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvq.exporter.architectures.rope import frequencies
from kvq.exporter.sources.base import Source, positive
from kvq.runtime.bundle.manifest import MOST, MOST_FEATURES, Architecture
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# What configurations leave out when it is the usual (transformers' LlamaConfig).
EPSILON, CONTEXT = 1e-6, 2048
# Anything else would be another computation.
ONLY = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}

# What config.json calls the parts of an `Architecture`.
FIELDS = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab": "vocab_size",
    "context": "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class Llama:
    """What the graphs of a Llama depend on beside its weights.

    Attributes:
        shape: of the model.
        norm_epsilon: of the RMS norms.
        tied: whether the head is the embedding.
        inv_freq: rotary frequencies, float32 [head_dim // 2].
        rope_scale: factor on cosine and sine (yarn's attention scaling, else 1).
        biases: name of a projection ("q_proj", ...) -> whether the configuration says that it has a bias.
    """

    shape: Architecture
    norm_epsilon: float
    tied: bool
    inv_freq: np.ndarray
    rope_scale: float
    biases: Mapping[str, bool]

    @classmethod
    def of(cls, source: Source) -> Llama:
        """The description of a source's model, whose parameters are all there.

        Raises:
            CheckpointError: a configuration that is not valid, or parameters that do not fit it.
            UnsupportedArchitectureError: another architecture, or a variant that kvq does not implement.
        """
        config, name = source.config, source.name
        kind = config.get("model_type")
        if kind != "llama":
            raise UnsupportedArchitectureError(
                f"{name} is of model_type {kind!r}; kvq exports the Llama architecture (model_type 'llama') only"
            )
        for field, supported in ONLY.items():
            value = config.get(field, supported)
            if value != supported:
                raise UnsupportedArchitectureError(f"{name} has {field}={value!r:.80}; kvq supports {supported!r} only")
        shape = _shape(config, name)
        epsilon = config.get("rms_norm_eps", EPSILON)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
            raise CheckpointError(
                f"config.json of {name} has rms_norm_eps={epsilon!r:.60}; fix it: it must be small, above 0"
            )
        biases = {part: config.get("attention_bias") is True for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
        biases |= {part: config.get("mlp_bias") is True for part in ("gate_proj", "up_proj", "down_proj")}
        tied = config.get("tie_word_embeddings") is True
        found = cls(shape, float(epsilon), tied, np.empty(0, np.float32), 1.0, biases)
        found._check(source)  # from here on, sizes are those of arrays that are there
        inv_freq, rope_scale = frequencies(config, shape.head_dim, shape.context, name)
        return replace(found, inv_freq=inv_freq, rope_scale=rope_scale)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter there must be."""
        s = self.shape
        hidden, queries, keys = (s.hidden,), s.heads * s.head_dim, s.kv_heads * s.head_dim
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": hidden}
        for part, rows, columns in (
            ("self_attn.q_proj", queries, s.hidden),
            ("self_attn.k_proj", keys, s.hidden),
            ("self_attn.v_proj", keys, s.hidden),
            ("self_attn.o_proj", s.hidden, queries),
            ("mlp.gate_proj", s.ffn, s.hidden),
            ("mlp.up_proj", s.ffn, s.hidden),
            ("mlp.down_proj", s.hidden, s.ffn),
        ):
            layer[f"{part}.weight"] = (rows, columns)
            if self.biases[part.split(".")[1]]:
                layer[f"{part}.bias"] = (rows,)
        layer["post_attention_layernorm.weight"] = hidden
        found = {EMBEDDING: (s.vocab, s.hidden), FINAL_NORM: hidden}
        found |= {} if self.tied else {HEAD: (s.vocab, s.hidden)}
        return found | {f"model.layers.{i}.{name}": shape for i in range(s.layers) for name, shape in layer.items()}

    def _check(self, source: Source) -> None:
        """Compare what there is with what there must be."""
        there = source.shapes
        if self.shape.layers > len(there):
            raise CheckpointError(
                f"{source.name} has num_hidden_layers={self.shape.layers} and only {len(there)} weights; check that"
                " configuration and weights belong together"
            )
        wanted = self.parameters()
        bad = sorted(name for name, shape in wanted.items() if there.get(name) != shape)
        if bad:
            has = f"has the shape {there[bad[0]]}, not {wanted[bad[0]]}" if bad[0] in there else "is missing"
            raise CheckpointError(
                f"{source.name} lacks {len(bad)} weights or has them in other shapes than its configuration says, first"
                f" {bad[0]}, which {has}; check that configuration and weights belong together"
            )
        # A bias that the configuration does not speak of would be left out, and the text be another one.
        ours = (name for name in there if name.startswith(("model.", "lm_head.")))
        foreign = sorted(name for name in ours if name.endswith(".bias") and name not in wanted)
        if foreign:
            raise UnsupportedArchitectureError(
                f"{source.name} has {foreign[0]}, of which its configuration says nothing; kvq supports biases of"
                " projections where attention_bias or mlp_bias says so"
            )


def _shape(config: Mapping[str, Any], name: str) -> Architecture:
    def integer(field: str, default: int | None = None) -> int:
        value = config.get(field)
        return positive(default if value is None else value, f"config.json of {name} has {field}")

    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads, head_dim = integer("num_key_value_heads", heads), integer("head_dim", hidden // heads)
    if head_dim % 8 or heads % kv_heads:
        raise UnsupportedArchitectureError(
            f"{name} has head_dim {head_dim}, {heads} heads and {kv_heads} KV heads; head_dim must be a multiple of 8,"
            " heads of KV heads"
        )
    shape = Architecture(
        layers=integer("num_hidden_layers"),
        hidden=hidden,
        ffn=integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=integer("vocab_size"),
        context=integer("max_position_embeddings", CONTEXT),
    )
    for part, field in FIELDS.items():  # a manifest of more would be refused by whoever reads it
        value, most = getattr(shape, part), MOST.get(part, MOST_FEATURES)
        if value > most:
            raise UnsupportedArchitectureError(f"{name} has {field}={value}; kvq supports at most {most}")
    return shape
