"""The Llama architecture (Touvron et al., arXiv 2302.13971), which SmolLM and SmolLM2 have too."""

from __future__ import annotations

from kvq.exporter.architectures.checks import epsilon_of, refuse_variants, shape_of
from kvq.exporter.architectures.description import (
    Add,
    Attend,
    Family,
    Gguf,
    Layer,
    Model,
    Norm,
    Project,
    SwiGLU,
)
from kvq.exporter.architectures.rope import frequencies
from kvq.exporter.sources.base import Source

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Anything else would be another computation.
ONLY = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}


def llama(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    config, name = source.config, source.name
    refuse_variants(config, name, ONLY)
    shape, epsilon = shape_of(config, name), epsilon_of(config, name)
    attention_bias, mlp_bias = (config.get(field) is True for field in ("attention_bias", "mlp_bias"))
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        q, k, v, o = (f"{prefix}.self_attn.{part}_proj" for part in "qkvo")
        gate, up, down = (f"{prefix}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        return Layer.of(
            Norm(f"{prefix}.input_layernorm.weight", hidden, epsilon),
            Attend(
                inputs=Project((q, k, v), (queries, keys, keys), hidden, attention_bias),
                output=Project((o,), (hidden,), queries, attention_bias),
            ),
            Add(),
            Norm(f"{prefix}.post_attention_layernorm.weight", hidden, epsilon),
            Project((gate, up), (shape.ffn, shape.ffn), hidden, mlp_bias),
            SwiGLU(),
            Project((down,), (hidden,), shape.ffn, mlp_bias),
            Add(),
        )

    inv_freq, rope_scale = frequencies(config, shape.head_dim, shape.context, name)
    return Model(
        shape=shape,
        embedding=EMBEDDING,
        layers=tuple(layer(index) for index in range(shape.layers)),
        norm=Norm(FINAL_NORM, hidden, epsilon),
        head=EMBEDDING if config.get("tie_word_embeddings") is True else HEAD,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )


GGUF = Gguf(
    architecture="llama",
    layer={
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    },
    whole={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    interleaved={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
    config={"hidden_act": "silu"},
)  # fmt: skip

ARCHITECTURES = {"llama": Family(llama, GGUF)}
