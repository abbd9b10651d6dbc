"""Bundles that are changed in place, as damage or an attacker would, and how loading has to refuse them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvq
from kvq.runtime.bundle.bundle import digest
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.errors import BundleError

Damage = Callable[[Path], Any]
SEGMENT = "segment_001.onnx"


def refusal(folder: Path) -> str:
    """Load a bundle, expect a refusal of one line with a remedy, return the line."""
    with pytest.raises(BundleError) as caught:
        kvq.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "export" in message, f"no remedy in: {message}"
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change kvq.json in place."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def relist(folder: Path, name: str) -> None:
    """Write the true size and digest of a file into the manifest, as an attacker would."""
    entry = {"nbytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    edit(folder, lambda data: data["files"].update({name: entry}))
