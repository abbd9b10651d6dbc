"""Checkpoints of models of text and images: their text model, under the names that it has alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from kvq.runtime.errors import CheckpointError

# By model_type of the whole: what the configuration of its text model leaves out.
TEXT_PARTS: dict[str, dict[str, Any]] = {"gemma3": {"model_type": "gemma3_text", "vocab_size": 262208}}
# Our own field of config.json: the model_type of what the text model is a part of.
PART_OF = "text_part_of"
# What stands before the names of the text model's parameters, older transformers' first -> before its own alone.
PREFIXES = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}

Place = TypeVar("Place")


def text_config(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The configuration of the text model in that of a whole; None where it is not of a kind that has one.

    Raises:
        CheckpointError: it has none, though it is of such a kind.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        return None
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json of {name} has no text_config; give the folder of the whole checkpoint")
    of_whole = {field: config[field] for field in ("eos_token_id", "license", "tie_word_embeddings") if field in config}
    return of_whole | TEXT_PARTS[kind] | dict(text) | {PART_OF: kind}


def own_names(names: Mapping[str, Place]) -> dict[str, Place]:
    """The text model's parameters by the names that it has alone; others are left out."""
    found = {}
    for name, place in names.items():
        for prefix, own in PREFIXES.items():
            if name.startswith(prefix):
                found[own + name.removeprefix(prefix)] = place
        if name.startswith("lm_head."):
            found[name] = place
    return found
