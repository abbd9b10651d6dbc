"""What several workers of pytest-xdist need is made by the first that asks; the others wait for it and take it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvq.runtime.files import lock


def common_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all its workers have."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A folder that `make` has filled, and what it returned, as JSON has it; read only. What fails is tried again."""
    common = common_folder(factory)
    folder, told = common / name, common / f"{name}.json"
    with lock(common / f"{name}.lock"):
        if not told.exists():
            folder.mkdir(exist_ok=True)
            text = json.dumps(make(folder))
            told.write_text(text)
    return folder, json.loads(told.read_text())
