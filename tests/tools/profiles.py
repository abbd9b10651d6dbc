"""Bundles whose classes have profiles, made without an export: of the tiny one's 3 layers of heads of 8."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.tools.bundles import edit

# Of 8 channels 2, u4 and 4 bits take 6 bytes, 3 and 8 bits 10.
PROFILES = {
    "k3v3": [[8, 2], [3, 5], [2, 8]],
    "k4v4": [[2, 5], [5, 2], [4, 4]],
    "k8v4": [[3, 2], [8, 5], [2, 2]],
    "k2v8": [[2, 3], [2, 8], [2, 5]],
}


def with_profiles(bundle: Path, folder: Path) -> Path:
    """A copy of the tiny bundle whose classes have profiles."""
    shutil.copytree(bundle, folder)
    edit(folder, lambda data: data["architecture"].update({"profiles": PROFILES}))
    return folder
