"""Sliding windows: which layers see the newest tokens alone, and how many."""

from __future__ import annotations

from kvq.exporter.architectures.parts import Parts
from kvq.exporter.sources.base import positive
from kvq.runtime.errors import CheckpointError

# Defaults of transformers' configurations that have `use_sliding_window`: the window, and the first layer with one.
WINDOW, FIRST = 4096, 28
KINDS = ("sliding_attention", "full_attention")


def windows(parts: Parts, default: int | None = None, unlisted: list[bool] | None = None) -> list[int]:
    """Tokens that a token sees in each layer, itself included; 0 is all. Those have a window that `layer_types` says.

    Args:
        parts: of the model.
        default: the window that there is where the configuration does not speak of one; None is none.
        unlisted: which layers have one where `layer_types` is not there; None: all.

    Raises:
        CheckpointError: the window is no size, or the kinds of layers are not those of every layer.
    """
    kinds, size = listed_kinds(parts), window_size(parts, default)
    local = unlisted or [True] * parts.shape.layers if kinds is None else kinds
    return [size if has_one else 0 for has_one in local]


def later_windows(parts: Parts) -> list[int]:
    """The same where `use_sliding_window` says whether there are any, and `max_window_layers` how many layers, the
    first ones, have none.

    Raises:
        CheckpointError: as there, or one of them is no size.
    """
    layers = parts.shape.layers
    if not parts.says("use_sliding_window"):
        return [0] * layers
    first = parts.config.get("max_window_layers", FIRST)
    first = positive(first, f"config.json of {parts.name} has max_window_layers") if first else 0
    return windows(parts, WINDOW, [i >= first for i in range(layers)])


def listed_kinds(parts: Parts) -> list[bool] | None:
    """Whether each layer has a window, as `layer_types` lists it; None where it does not.

    Raises:
        CheckpointError: it does not say it of every layer, or says something else.
    """
    kinds, layers = parts.config.get("layer_types"), parts.shape.layers
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        raise CheckpointError(
            f"config.json of {parts.name} has layer_types={kinds!r:.60}; fix it: it must be one of"
            f" {' and '.join(KINDS)} for each of {layers} layers"
        )
    return [kind == KINDS[0] for kind in kinds]


def window_size(parts: Parts, default: int | None = None) -> int:
    """The window; 0 where there is none, or none that a text of the model's context comes to."""
    window = parts.config.get("sliding_window", default)
    size = 0 if window is None else positive(window, f"config.json of {parts.name} has sliding_window")
    return size if size < parts.shape.context else 0
