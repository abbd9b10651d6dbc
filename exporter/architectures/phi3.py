"""Phi-3 (arXiv 2404.14219) and Phi-4-mini (arXiv 2503.01743): matrices of one piece, heads that are rotated in part,
and factors of rotary frequencies that are others for texts beyond the original context.

transformers changes from one to the other in the middle of a text, whose keys are of both then. A bundle has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvq.exporter.architectures.description import Adapted, Attend, Family, Model, Project, Rotary, SwiGLU
from kvq.exporter.architectures.parts import LAYER, ONLY, Parts, gguf
from kvq.exporter.architectures.rope import kind_of, rotary
from kvq.exporter.architectures.windows import windows
from kvq.exporter.sources.base import Source, positive, positive_number
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LONG = ("longrope", "su", "yarn")  # what files call it, "su" and "yarn" older ones


def phi3(source: Source) -> Model:
    """The description of a source's model; see `Family.describe`."""
    only = {field: value for field, value in ONLY.items() if field != "partial_rotary_factor"}
    parts = Parts.of(source, only | {"attention_bias": False}, **DEFAULTS)
    notes: tuple[str, ...] = ()
    shape, config = parts.shape, dict(parts.config)
    rotated = _rotated(config, shape.head_dim, parts.name)
    config["rope_scaling"], context = _of_one_length(parts, source.context)
    if context < shape.context:
        more = f"context {context} of {shape.context}: longer texts are rotated by other factors; see --context"
        notes = (more,) if source.context is None else ()
        parts = replace(parts, shape=replace(shape, context=context))
    read = ("original_max_position_embeddings", "partial_rotary_factor")
    known = {field: value for field, value in config.items() if field not in read}
    part = rotary(known, rotated, parts.shape.context, parts.name)
    queries, keys, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    order = _order(shape.heads + shape.kv_heads, shape.kv_heads, shape.head_dim, rotated)
    layers, adapted, sees = [], {}, windows(parts)
    for i in range(shape.layers):
        qkv, o = (f"model.layers.{i}.self_attn.{name}_proj" for name in ("qkv", "o"))
        gate_up, down = (f"model.layers.{i}.mlp.{name}_proj" for name in ("gate_up", "down"))
        inputs, output = Project((qkv,), (queries + 2 * keys,), hidden), Project((o,), (hidden,), queries)
        attend = Attend(inputs, output, window=sees[i])
        mlp = Project((gate_up,), (2 * shape.ffn,), hidden), SwiGLU(), Project((down,), (hidden,), shape.ffn)
        layers.append(parts.pre_norm(i, attend, mlp))
        if rotated < shape.head_dim:
            adapted[f"{qkv}.weight"] = Adapted(order=order)
    return parts.model(layers, (_widened(part, shape.head_dim),), adapted=adapted, notes=notes)


def _rotated(config: Mapping[str, Any], head_dim: int, name: str) -> int:
    """Channels of a head that are rotated, from the first on."""
    factor = config.get("partial_rotary_factor", 1.0)
    factor = positive_number(1.0 if factor is None else factor, f"config.json of {name} has partial_rotary_factor")
    rotated = int(head_dim * factor)
    if factor > 1 or rotated % 2 or rotated < 2:
        raise UnsupportedArchitectureError(
            f"{name} has partial_rotary_factor={factor!r} of {head_dim} channels; kvq supports whole pairs of them"
        )
    return rotated


def _of_one_length(parts: Parts, wanted: int | None) -> tuple[dict[str, Any] | None, int]:
    """rope_scaling of a configuration for texts of the wanted length (None: the original), and how long they may be."""
    config, most = parts.config, parts.shape.context
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or kind_of(scaling) not in LONG or "long_factor" not in scaling:
        return scaling, most
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = positive(original, f"config.json of {parts.name} has original_max_position_embeddings")
    context = min(most, original if wanted is None else wanted)
    factors = scaling.get("short_factor" if context <= original else "long_factor")
    attention = scaling.get("attention_factor")
    if attention is None:  # of the whole context, whatever window makes texts shorter
        stretch = most / original
        if original < 2:
            raise CheckpointError(
                f"config.json of {parts.name} has original_max_position_embeddings={original}; fix it: a text has more"
            )
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {"rope_type": "factors", "factors": factors, "attention_factor": attention}, context


def _order(heads: int, values: int, head_dim: int, rotated: int) -> np.ndarray:
    """Where rows of queries, keys and values come from, int [rows].

    The model pairs channel i of a head with channel rotated // 2 + i and leaves those behind as they are, the runtime
    pairs i with head_dim // 2 + i: scores are the same where channels of queries and keys change places alike.
    """
    half, pairs = head_dim // 2, rotated // 2
    still = np.arange(rotated, head_dim)
    first = np.concatenate([np.arange(pairs), still[: half - pairs]])
    head = np.concatenate([first, np.arange(pairs, rotated), still[half - pairs :]])
    both = (np.arange(heads)[:, None] * head_dim + head).ravel()
    return np.concatenate([both, heads * head_dim + np.arange(values * head_dim)])


def _widened(part: Rotary, head_dim: int) -> Rotary:
    """A rotary embedding of some channels as one of the whole head, which leaves the others as they are."""
    missing = head_dim // 2 - len(part.inv_freq)
    return Rotary(np.pad(part.inv_freq, (0, missing)), np.pad(part.scale, (0, missing), constant_values=1))


GGUF_LAYER = {name: ours for name, ours in LAYER.items() if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
GGUF_LAYER |= {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
ARCHITECTURES = {"phi3": Family(phi3, gguf("phi3", layer=GGUF_LAYER, rotates_parts=True))}
