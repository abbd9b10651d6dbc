"""Packages that not every environment has: the implementations that some tests compare with."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def needs(package: str) -> ModuleType:
    """The package. Without it the test, or the whole module that asks, is skipped by the package's name.

    Where a landing is decided (KVQ_CI=1) it is an error instead: what was skipped would pass for tested.
    """
    if os.environ.get("KVQ_CI") == "1":
        found = importlib.import_module(package)
    else:
        found = pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "torch":
        found.set_num_threads(1)  # the tensors are small; waiting for other threads would cost more
    return found
