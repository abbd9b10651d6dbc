"""Where checkpoints come from: one file a format."""

from __future__ import annotations

import importlib
from pathlib import Path

from kvq.exporter.sources.base import Blocks, Source

__all__ = ["FILES", "Blocks", "Source", "open_source"]
# Formats that are one file: suffix -> module of this package, and its class. Each needs packages of its own, so it is
# imported when a file of it is opened.
FILES = {".gguf": ("gguf", "GgufFile")}


def open_source(reference: str) -> Source:
    """The source that a reference names.

    Args:
        reference: a folder, a file with a suffix of `FILES`, or a hub id (owner/name).

    Raises:
        CheckpointError: there is no such thing, or it cannot be read.
        UnsupportedArchitectureError: a file of an architecture that is not known.
    """
    path = Path(reference)
    if path.suffix.lower() in FILES and not path.is_dir():
        module, kind = FILES[path.suffix.lower()]
        return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(path)
    from kvq.exporter.sources.huggingface import HuggingFaceFolder, snapshot

    if path.is_dir():
        return HuggingFaceFolder(path, path.resolve().name)
    return HuggingFaceFolder(snapshot(reference), reference)
