"""Frequencies of the rotary embedding (Su et al., arXiv 2104.09864) and their scalings, as in transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvq.exporter.architectures.description import Rotary
from kvq.exporter.sources.base import positive_number
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

# Kinds whose frequencies do not depend on how long the text is. "factors" is kvq's own: a divisor per frequency,
# and perhaps a factor on cosine and sine.
KINDS = ("default", "linear", "llama3", "yarn", "factors")
# What each reads beside its kind. Whatever else a file says would change the frequencies, and is refused.
READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
    "factors": ("factors", "attention_factor"),
}  # fmt: skip
# Read elsewhere, or here.
OUTSIDE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
# How fields that set a rotary embedding begin, in config.json.
BEGINNINGS = ("rope_", "rotary_", "partial_rotary", "use_rope", "no_rope", "nope_")
# What a scaling holds beside its kind that must be a positive number.
NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow",
)  # fmt: skip


def settings(config: Mapping[str, Any], name: str) -> tuple[float, dict[str, Any]]:
    """Base and scaling of a config.json in any dialect: rope_theta with rope_scaling, or rope_parameters.

    Raises:
        CheckpointError: one of them is not what it must be.
        UnsupportedArchitectureError: only a part of every head is rotated, or a field that nobody reads.
    """
    what = f"the configuration of {name} has"
    scaling: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):  # the first is of transformers 5: the base stands inside
        part = config.get(field)
        if part is not None and not isinstance(part, Mapping):
            raise CheckpointError(f"{what} {field}={part!r:.60}; fix it: it must be an object")
        for key, value in (part or {}).items():
            if value is not None and scaling.get(key) not in (None, value):
                raise CheckpointError(f"{what} {key} twice, in rope_parameters and rope_scaling; fix it: leave one out")
            scaling[key] = scaling.get(key) if value is None else value
    inside, outside = scaling.pop("rope_theta", None), config.get("rope_theta")
    theta = outside if inside is None else inside
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitectureError(
            f"{what} partial_rotary_factor={scaling['partial_rotary_factor']!r:.60}; kvq supports 1.0 only"
        )
    _refuse_unread(config, scaling, what)
    for field in NUMBERS:
        if scaling.get(field) is not None:
            positive_number(scaling[field], f"{what} rope_scaling with {field}")
    return positive_number(10000.0 if theta is None else theta, f"{what} rope_theta"), scaling


def _refuse_unread(config: Mapping[str, Any], scaling: Mapping[str, Any], what: str) -> None:
    """Raise for fields of the rotary embedding that nothing here reads: the model would be another one."""
    kinds = {scaling[field] for field in ("rope_type", "type") if isinstance(scaling.get(field), str)}
    if len(kinds) > 1:
        raise CheckpointError(f"{what} rope_scaling of two kinds, {' and '.join(sorted(kinds)):.60}; fix it: keep one")
    kind = kind_of(scaling)
    if not isinstance(kind, str) or kind not in READ:
        return  # refused as a whole
    known = ("rope_type", "type", "partial_rotary_factor", *READ[kind])
    unread = sorted(
        f"rope_scaling with {field}" for field, value in scaling.items() if value is not None and field not in known
    )
    unread += sorted(
        field
        for field, value in config.items()
        if value not in (None, False) and field not in OUTSIDE and field.startswith(BEGINNINGS)
    )
    if unread:
        raise UnsupportedArchitectureError(
            f"{what} {unread[0]:.60}, which kvq does not read; kvq supports {', '.join(sorted(KINDS[:4]))} with their"
            " own fields"
        )


def kind_of(scaling: Mapping[str, Any]) -> str:
    """Which scaling it is; "default" is none."""
    return scaling.get("rope_type", scaling.get("type", "default"))


def rotary(config: Mapping[str, Any], head_dim: int, context: int, name: str) -> Rotary:
    """The rotary embedding that a configuration says.

    Args:
        config: of config.json.
        head_dim: elements of a head, all of which are rotated.
        context: max_position_embeddings.
        name: of the checkpoint, for messages.

    Raises:
        UnsupportedArchitectureError: a scaling that is not in `KINDS`.
        CheckpointError: a scaling that lacks what it needs, or holds something that is no number.
    """
    theta, scaling = settings(config, name)
    kind = kind_of(scaling)
    if kind not in KINDS:
        raise UnsupportedArchitectureError(
            f"{name} scales its rotary embedding by {kind!r:.60}; known: {', '.join(sorted(KINDS[:4]))}"
        )
    try:
        with np.errstate(all="ignore"):
            plain = float(theta) ** -(np.arange(0, head_dim, 2) / head_dim)
            found, factor = _SCALED[kind](plain, scaling, context)
            found = np.asarray(found, np.float32)
        if found.shape != (head_dim // 2,) or not np.isfinite(found).all() or not math.isfinite(factor):
            raise ValueError("a number that gives finite frequencies")
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"rope_scaling of {name} is {scaling!r:.100}, which lacks or misstates {error!s:.60}; fix it or"
            " download the model again"
        ) from None
    return Rotary(found, np.full(len(found), factor, np.float32))


def _linear(plain: np.ndarray, scaling: Mapping[str, Any], context: int) -> tuple[np.ndarray, float]:
    return plain / scaling["factor"], 1.0


def _factors(plain: np.ndarray, scaling: Mapping[str, Any], context: int) -> tuple[np.ndarray, float]:
    return plain / np.asarray(scaling["factors"], np.float64), float(scaling.get("attention_factor") or 1.0)


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any], context: int) -> tuple[np.ndarray, float]:
    """Long waves are stretched, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # over the original context
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - share) * plain / factor + share * plain, 1.0


def _yarn(plain: np.ndarray, scaling: Mapping[str, Any], context: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., arXiv 2309.00071)."""
    factor, dim = scaling["factor"], 2 * len(plain)
    original = scaling.get("original_max_position_embeddings") or context

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = magnitude(factor, mscale) / magnitude(factor, everywhere) if mscale and everywhere else None
        attention = magnitude(factor) if attention is None else attention
    base = plain[1] ** (-dim / 2) if dim > 2 else 10000.0

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    share = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return plain / factor * share + plain * (1 - share), float(attention)


_SCALED = {
    "default": lambda plain, scaling, context: (plain, 1.0),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}
