"""Attention backends by name. A new backend is one new module here with a ``BACKENDS`` dict."""

from __future__ import annotations

import os
import sys

from kvq.runtime.compute.backends.base import AttentionBackend
from kvq.runtime.discovery import discover
from kvq.runtime.errors import BackendError

BACKENDS: dict[str, type[AttentionBackend]] = discover(sys.modules[__name__], "BACKENDS")


def make_backend(name: str | None = None) -> AttentionBackend:
    """The backend of that name; None reads KVQ_BACKEND; "auto" takes the fastest available.

    Raises:
        BackendError: no such backend in this installation.
    """
    if name is not None and not isinstance(name, str):
        raise BackendError(f"an attention backend is named by text, got {name!r:.60}; use auto")
    name = name or os.environ.get("KVQ_BACKEND") or "auto"
    if name != "auto":
        if name not in BACKENDS:
            raise BackendError(f"no attention backend {name!r:.60} here; use auto or one of: {', '.join(BACKENDS)}")
        return BACKENDS[name]()
    reasons = {kind: kind.unavailable() for kind in sorted(BACKENDS.values(), key=lambda kind: -kind.priority)}
    best = next(kind for kind, reason in reasons.items() if not reason)()
    # A lesser backend says why it is the one that runs.
    missing = [f"no {kind.name}: {reason}" for kind, reason in reasons.items() if reason]
    best.detail = "; ".join(filter(None, (best.detail, *missing)))
    return best


__all__ = ["BACKENDS", "AttentionBackend", "make_backend"]
