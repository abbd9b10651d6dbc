"""Gemma 3 (arXiv 2503.19786), its text models: four norms a layer and two of heads, which multiply with 1 + weight,
embeddings times the root of their size, a network with GELU, and two rotary embeddings.
"""

from __future__ import annotations

import math
from typing import Any

from kvq.exporter.architectures.description import Adapted, Add, Family, GeGLU, Layer, Model
from kvq.exporter.architectures.parts import FINAL_NORM, HEAD_NORMS, LAYER, Parts, gguf
from kvq.exporter.architectures.rope import rotary
from kvq.exporter.architectures.windows import listed_kinds, window_size
from kvq.exporter.sources.base import Source, positive
from kvq.exporter.sources.text_part import PART_OF
from kvq.runtime.errors import CheckpointError

ONLY = {
    "hidden_activation": "gelu_pytorch_tanh", "quantization_config": None, "partial_rotary_factor": 1.0,
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
    "attention_bias": False,
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rope_theta": 1e6, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
# Every so many layers one sees all; base of the others' rotary embedding; what queries are divided by the root of.
PATTERN, LOCAL_BASE, SCALAR = 6, 10000.0, 256
# Our own field: what has been added to the weights of norms already, as llama.cpp's converter does.
ADDED = "norm_weights_include"
GLOBAL, LOCAL = 0, 1  # rotary embeddings


def gemma3(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    parts = Parts.of(source, ONLY, **DEFAULTS)
    local = _local(parts)
    window = window_size(parts)
    notes = ("text alone: the part of the checkpoint that reads images is left out",) if PART_OF in parts.config else ()
    shape, offset = parts.shape, _offset(parts)
    # Attention divides by the root of head_dim itself.
    queries = math.sqrt(shape.head_dim / parts.number("query_pre_attn_scalar", _scalar(parts)))
    adapted, layers = {FINAL_NORM: Adapted(offset=offset)}, []
    for i in range(shape.layers):
        of_queries, of_keys = (parts.norm(i, f"self_attn.{part}_norm", shape.head_dim) for part in "qk")
        before, after = (parts.norm(i, f"{name}_layernorm") for name in ("input", "post_attention"))
        between, last = (parts.norm(i, f"{name}_feedforward_layernorm") for name in ("pre", "post"))
        attend = parts.attend(
            i, norms=(of_queries, of_keys), rotary=LOCAL if local[i] else GLOBAL, window=window * local[i]
        )
        layers.append(Layer.of(before, attend, after, Add(), between, *parts.mlp(i, activation=GeGLU()), last, Add()))
        for step in (before, after, between, last, of_keys):
            adapted[step.gain] = Adapted(offset=offset)
        adapted[of_queries.gain] = Adapted(offset=offset, factor=queries)
    of_local = {"rope_theta": parts.number("rope_local_base_freq", LOCAL_BASE)}
    rotaries = parts.rotary("rope_local_base_freq"), rotary(of_local, shape.head_dim, shape.context, parts.name)
    more = {"adapted": adapted, "embedding_scale": math.sqrt(shape.hidden), "notes": notes}
    return parts.model(layers, rotaries if any(local) else rotaries[:1], **more)


def _offset(parts: Parts) -> float:
    """What is to be added to the weights of norms.

    Raises:
        CheckpointError: the configuration has our own field, and it is neither 0 nor 1.
    """
    added = parts.config.get(ADDED, 0)
    if type(added) is not int or added not in (0, 1):
        raise CheckpointError(f"config.json of {parts.name} has {ADDED}={added!r:.60}; leave it out")
    return 1.0 - added


def _scalar(parts: Parts) -> float:
    """What queries are divided by the root of where that is not said: in GGUF files, as llama.cpp knows it."""
    is_27b = ADDED in parts.config and parts.shape.layers == 62
    return parts.shape.hidden / parts.shape.heads if is_27b else SCALAR


def _local(parts: Parts) -> list[bool]:
    """Whether each layer has a window and the rotary embedding that belongs to it.

    Raises:
        CheckpointError: the configuration does not say it of every layer, or says something else.
    """
    kinds, layers = listed_kinds(parts), parts.shape.layers
    if kinds is None:
        pattern = parts.config.get("sliding_window_pattern", PATTERN)
        positive(pattern, f"config.json of {parts.name} has sliding_window_pattern")
        return [(i + 1) % pattern != 0 for i in range(layers)]
    return kinds


GGUF_LAYER = LAYER | HEAD_NORMS | {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
GGUF = gguf(
    "gemma3",
    layer=GGUF_LAYER,
    config={"hidden_activation": "gelu_pytorch_tanh", ADDED: 1},
    numbers={"rope.freq_base_swa": "rope_local_base_freq"},
)
ARCHITECTURES = {"gemma3_text": Family(gemma3, GGUF)}
