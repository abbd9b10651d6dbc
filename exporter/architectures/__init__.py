"""What a layer computes, one file a family of models: a new one is a new module here with an ``ARCHITECTURES`` dict."""

from __future__ import annotations

import sys
from dataclasses import replace

from kvq.exporter.architectures.checks import check_parameters
from kvq.exporter.architectures.description import Family, Model
from kvq.exporter.architectures.foreign import what_is_missing
from kvq.exporter.sources.base import Source
from kvq.runtime.discovery import discover
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

# By model_type of config.json.
ARCHITECTURES: dict[str, Family] = discover(sys.modules[__name__], "ARCHITECTURES")


def describe(source: Source) -> Model:
    """The description of a source's model, whose parameters are all there.

    Raises:
        CheckpointError: a configuration that is not valid, or parameters that do not fit it.
        UnsupportedArchitectureError: a family, or a variant of one, that kvq does not implement.
    """
    kind = source.config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"{source.name} is of model_type {kind!r:.60}{what_is_missing(str(kind))}; kvq exports these only:"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    model = ARCHITECTURES[kind].describe(source)
    check_parameters(model, source)
    return model if source.context is None else _shortened(model, source)


def _shortened(model: Model, source: Source) -> Model:
    """A model for texts of the length that is asked for."""
    wanted, most = source.context, model.shape.context
    if wanted is None or not 0 < wanted <= most:
        raise CheckpointError(f"{source.name} has a context of {most} tokens; give a context from 1 to {most}")
    windows = tuple(window if window < wanted else 0 for window in model.shape.windows)
    return replace(model, shape=replace(model.shape, context=wanted, windows=windows if any(windows) else ()))


__all__ = ["ARCHITECTURES", "Family", "Model", "describe", "what_is_missing"]
