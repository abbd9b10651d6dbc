"""Where checkpoints come from: one file a format."""

from __future__ import annotations

from pathlib import Path

from kvq.exporter.sources.base import Blocks, Source

__all__ = ["Blocks", "Source", "open_source"]


def open_source(reference: str) -> Source:
    """The source that a reference names.

    Args:
        reference: a folder, a file that ends in .gguf, or a hub id (owner/name).

    Raises:
        CheckpointError: there is no such thing, or it cannot be read.
        UnsupportedArchitectureError: a GGUF file of another architecture.
    """
    path = Path(reference)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from kvq.exporter.sources.gguf import GgufFile

        return GgufFile(path)
    from kvq.exporter.sources.huggingface import HuggingFaceFolder, snapshot

    if path.is_dir():
        return HuggingFaceFolder(path, path.resolve().name)
    return HuggingFaceFolder(snapshot(reference), reference)
