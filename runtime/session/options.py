"""The keyword arguments of sessions and of generations, and how the two are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from kvq.runtime.policy.base import Policy
from kvq.runtime.session.generation import GenerationOptions


class SessionSettings(TypedDict, total=False):
    """The keyword arguments of `Model.session`."""

    policy: str | Policy | None
    recent: int
    sink: int
    prefill_chunk: int
    prefill: str
    backend: str | None
    kv_bits: float | None
    kv_memory: float | None
    protect_bits: int | None


class AllOptions(SessionSettings, GenerationOptions, total=False):
    """The keyword arguments of `Model.generate`."""


def parted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a session, and those of a generation."""
    names = SessionSettings.__annotations__
    settings = {name: value for name, value in options.items() if name in names}
    return settings, {name: value for name, value in options.items() if name not in names}
