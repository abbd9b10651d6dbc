"""Precision policies by name. A new policy is one new module here with a ``POLICIES`` dict.

A factory is called with the policy's options. One that has a parameter `bundle` is given the
loaded model's bundle: that is how a policy reaches a controller stored with the model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvq.runtime.discovery import discover
from kvq.runtime.errors import PolicyError
from kvq.runtime.policy.base import FEATURE_NAMES, Policy, ScoredPolicy, TokenFeatures
from kvq.runtime.precision.table import pairs

if TYPE_CHECKING:
    from kvq.runtime.bundle.bundle import Bundle

POLICIES: dict[str, Callable[..., Policy]] = discover(sys.modules[__name__], "POLICIES")


def make_policy(policy: str | Policy, bundle: Bundle | None = None, **options: Any) -> Policy:
    """The policy of that name, with its own options; a `Policy` object is returned as it is.

    Args:
        policy: a name of `POLICIES`, or a ready policy.
        bundle: the model's bundle, for policies that keep something in it.
        **options: the policy's own.

    Raises:
        PolicyError: unknown name, an option the policy does not take, or a bundle that lacks what it needs.
    """
    if isinstance(policy, Policy):
        if options:
            raise PolicyError(f"options {sorted(options)} given with a ready policy object; set them on the object")
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        names = sorted(POLICIES.keys() - {str(pair) for pair in pairs()})
        raise PolicyError(f"unknown policy {policy!r:.60}; use one of: {', '.join(names)}; or a pair, such as k8v4")
    factory, recipe = POLICIES[policy], (policy, dict(options))
    signature = inspect.signature(factory)
    if "bundle" in signature.parameters and "bundle" not in options:
        if bundle is None:
            raise PolicyError(f"policy {policy!r} comes with a model; get it through model.session({policy!r})")
        options["bundle"] = bundle
    try:
        signature.bind(**options)
    except TypeError:
        raise PolicyError(
            f"policy {policy!r} does not take the options {sorted(options.keys() - {'bundle'})}; leave them out"
        ) from None
    made = factory(**options)
    if made.recipe is None:
        made.recipe = recipe
    return made


__all__ = ["FEATURE_NAMES", "POLICIES", "Policy", "ScoredPolicy", "TokenFeatures", "make_policy"]
