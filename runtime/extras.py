"""How to install what an optional part of kvq needs, for messages."""

from __future__ import annotations

import importlib.util


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install 'kvq-run[{extra}]', in a checkout '.[{extra}]'"


def missing(*packages: str) -> str | None:
    """The first of these packages that is not installed."""
    return next((name for name in packages if importlib.util.find_spec(name) is None), None)
