"""Trained controllers and precisions by layer that come with the package, by the file of weights they were made for."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvq.runtime.bundle.bundle import digest
from kvq.runtime.bundle.manifest import Manifest
from kvq.runtime.bundle.profiles import Profiles, profiles_of

INDEX, PROFILES = "controllers.json", "profiles.json"
# What they were trained on: keys and values as every bundle with default options holds them.
TRAINED_KV = {"rotation": "hadamard", "centered": True, "keys": "balanced"}


def shipped(sha256: str) -> tuple[Path, dict[str, dict[str, Any]]] | None:
    """Folder and entries (as in `Manifest.controllers`) of the controllers for a source; None if there are none."""
    root = Path(str(importlib.resources.files("kvq.models"))) / "controllers"
    for index in sorted(root.glob(f"*/{INDEX}")):
        content = json.loads(index.read_text(encoding="utf-8"))
        if sha256 in content["sources"]:
            return index.parent, content["controllers"]
    return None


def _fitting(manifest: Manifest) -> tuple[Path, dict[str, dict[str, Any]]] | None:
    """What there is for a bundle, if its keys and values are as they were when it was made."""
    if any(manifest.kv.get(name) != value for name, value in TRAINED_KV.items()):
        return None
    return shipped(manifest.source.get("sha256", ""))


def profiles_for_source(manifest: Manifest) -> Profiles:
    """The precisions by layer that come with the package for a bundle's source, beside its controllers; none if there
    are none.
    """
    found = _fitting(manifest)
    if found is None or not (file := found[0] / PROFILES).exists():
        return ()
    return profiles_of(json.loads(file.read_text(encoding="utf-8")))


def attach(manifest: Manifest, folder: Path) -> Manifest:
    """Copy the controllers that belong to a bundle's source into its folder; the manifest that lists them."""
    found = _fitting(manifest)
    if found is None:
        return manifest
    origin, entries = found
    files, controllers = dict(manifest.files), {}
    for name, entry in entries.items():
        file = folder / entry["file"]
        shutil.copyfile(origin / entry["file"], file)
        files[file.name] = {"nbytes": file.stat().st_size, "sha256": digest(file)}
        controllers[name] = {**entry, "model": manifest.model_digest}
    return replace(manifest, files=files, controllers=controllers)
