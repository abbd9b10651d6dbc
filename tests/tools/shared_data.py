"""Data that lies beside a checkout rather than in it; tests that need it skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("KVQ_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def shared_file(*parts: str) -> Path:
    """The file, or a skip that says what is missing."""
    file = SHARED.joinpath(*parts)
    if not file.is_file():
        pytest.skip(f"needs {file} (set KVQ_SHARED to the folder that holds data/)")
    return file
