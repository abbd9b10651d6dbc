"""The rotary embedding of a GGUF file as fields of config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvq.exporter.sources.base import positive_number
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

# Tensors that belong to the configuration: divisors of frequencies, for any text, or for short and for long ones.
ANY, SHORT, LONG = FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
Field = Callable[..., Any]


def rope_fields(
    field: Field, factors: Mapping[str, np.ndarray], rotated: int, context: int, path: Path
) -> dict[str, Any]:
    """Fields of config.json that say the rotary embedding, but for its base.

    Args:
        field: key behind the architecture's name, default -> value.
        factors: name of a tensor of `FACTORS` -> float32 [...], of those that the file has.
        rotated: channels of a head that are rotated.
        context: of the model.
        path: of the file.

    Raises:
        CheckpointError: a number that none is, or factors that do not fit.
        UnsupportedArchitectureError: a scaling that is not known, or two.
    """
    scaling = _scaling(field, context, path)
    found = {name: _checked(values, name, rotated, path) for name, values in factors.items()}
    if not found:
        return {} if scaling is None else {"rope_scaling": scaling}
    if scaling is not None and scaling["rope_type"] != "longrope":
        raise UnsupportedArchitectureError(
            f"{path.name} has {min(found)} and rope.scaling.type {scaling['rope_type']!r:.60}; kvq supports one of them"
            " only"
        )
    if found.keys() == {ANY}:
        return {"rope_scaling": {"rope_type": "factors", "factors": found[ANY]}}
    if found.keys() != {SHORT, LONG}:
        raise CheckpointError(f"{path.name} has {', '.join(sorted(found))} alone; download it again")
    attention = field("rope.scaling.attn_factor", 1.0)
    return {
        "original_max_position_embeddings": field("rope.scaling.original_context_length", context),
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": found[SHORT],
            "long_factor": found[LONG],
            "attention_factor": positive_number(attention, f"{path.name} has rope.scaling.attn_factor"),
        },
    }


def _checked(factors: np.ndarray, name: str, rotated: int, path: Path) -> list[float]:
    if factors.shape != (rotated // 2,):
        raise CheckpointError(
            f"{name} of {path.name} has the shape {factors.shape}, not {(rotated // 2,)}; download the file again"
        )
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise CheckpointError(f"{name} of {path.name} holds what is no positive number; download the file again")
    return factors.astype(np.float64).tolist()


def _scaling(field: Field, context: int, path: Path) -> dict[str, Any] | None:
    """`rope_scaling` as llama.cpp reads the fields."""
    kind = field("rope.scaling.type", "linear")
    factor = field("rope.scaling.factor", field("rope.scale_linear")) or 1
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind != "yarn":
        return {"rope_type": kind, "factor": factor}
    scaling = {"rope_type": kind, "factor": positive_number(factor, f"{path.name} has rope.scaling.factor")}
    scaling["original_max_position_embeddings"] = field("rope.scaling.original_context_length", context)
    # llama.cpp multiplies with it, transformers takes it instead of its own.
    attention = positive_number(field("rope.scaling.attn_factor", 1.0), f"{path.name} has rope.scaling.attn_factor")
    scaling["attention_factor"] = attention * (1 + 0.1 * math.log(max(1, factor)))
    for key in ("beta_fast", "beta_slow"):
        scaling[key] = field(f"rope.scaling.yarn_{key}")
    if field("rope.scaling.yarn_log_multiplier"):
        raise UnsupportedArchitectureError(
            f"{path.name} has rope.scaling.yarn_log_multiplier; kvq supports YaRN without it only"
        )
    return scaling
