"""Precision policies by name. A new policy is one new module here with a ``POLICIES`` dict."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from kvq.controller.policies.base import FEATURE_NAMES, Policy, TokenFeatures
from kvq.runtime.discovery import discover
from kvq.runtime.errors import PolicyError

POLICIES: dict[str, Callable[..., Policy]] = discover(sys.modules[__name__], "POLICIES")


def make_policy(policy: str | Policy, **options: Any) -> Policy:
    """The policy of that name, with its own options; a `Policy` object is returned as it is.

    Raises:
        PolicyError: unknown name, or an option the policy does not take.
    """
    if isinstance(policy, Policy):
        if options:
            raise PolicyError(f"options {sorted(options)} given with a ready policy object; set them on the object")
        return policy
    if policy not in POLICIES:
        raise PolicyError(f"unknown policy {policy!r}; use one of: {', '.join(sorted(POLICIES))}")
    factory = POLICIES[policy]
    try:
        inspect.signature(factory).bind(**options)
    except TypeError:
        raise PolicyError(f"policy {policy!r} does not take the options {sorted(options)}; leave them out") from None
    return factory(**options)


__all__ = ["FEATURE_NAMES", "POLICIES", "Policy", "TokenFeatures", "make_policy"]
