"""Sliding windows, which kvq does not have yet: to a text of no more tokens than the window there is none."""

from __future__ import annotations

from dataclasses import replace

from kvq.exporter.architectures.parts import Parts
from kvq.exporter.sources.base import positive

# Defaults of transformers' configurations that have `use_sliding_window`: the window, and the first layer with one.
WINDOW, FIRST = 4096, 28


def without_window(parts: Parts, default: int | None = None) -> tuple[Parts, tuple[str, ...]]:
    """Parts of a model whose texts are no longer than the window of its layers, and what to say of it.

    Args:
        parts: of the model.
        default: the window that there is where the configuration does not speak of one; None is none.

    Raises:
        CheckpointError: the window is no size.
    """
    window, context = parts.config.get("sliding_window", default), parts.shape.context
    if window is None or positive(window, f"config.json of {parts.name} has sliding_window") >= context:
        return parts, ()
    note = f"context {window} of {context}: layers see the last {window} tokens only, and kvq has no such windows yet"
    return replace(parts, shape=replace(parts.shape, context=window)), (note,)


def without_later_windows(parts: Parts) -> tuple[Parts, tuple[str, ...]]:
    """The same where `use_sliding_window` says whether there is one, and `max_window_layers` in which layers.

    Raises:
        CheckpointError: one of them is no size.
    """
    kinds, first = parts.config.get("layer_types"), parts.config.get("max_window_layers", FIRST)
    if isinstance(kinds, list):
        used = "sliding_attention" in kinds
    else:
        used = first is None or first == 0 or positive(first, "max_window_layers") < parts.shape.layers
    return without_window(parts, WINDOW) if parts.says("use_sliding_window") and used else (parts, ())
