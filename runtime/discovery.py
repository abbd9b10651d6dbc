"""Find what the modules of a package offer, so that adding a file adds an implementation."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def discover(package: ModuleType, attribute: str) -> dict[Any, Any]:
    """Merge the dict `attribute` of every module of `package`; names must be unique.

    Modules without the attribute (helpers, base classes) are passed over.
    """
    found: dict[Any, Any] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        offered = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), attribute, {})
        if clash := found.keys() & offered.keys():
            raise RuntimeError(f"{package.__name__}.{info.name} redefines {sorted(map(str, clash))}")
        found.update(offered)
    return found
