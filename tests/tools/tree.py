"""The repository's own files, for tests that read them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# What an installed kvq consists of, beside the folder kvq itself.
PACKAGES = ["bench", "controller", "exporter", "models", "runtime"]


def sources(*folders: str, kinds: tuple[str, ...] = (".py",)) -> Iterator[Path]:
    """Files of these kinds below these folders of the repository, in order."""
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in kinds)


def named(path: Path) -> str:
    """A file as it is named in messages: from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))
