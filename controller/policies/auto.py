"""The policy of whoever wants choices and names none: the model's own controller, or rules where it has none."""

from __future__ import annotations

import shlex

from kvq.controller.policies.learned import LearnedPolicy
from kvq.controller.policies.rule import RulePolicy
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.policy.base import ScoredPolicy


def auto(bundle: Bundle) -> ScoredPolicy:
    """ "adaptive" where the bundle has that controller, else "rule", which says why."""
    if "adaptive" in bundle.manifest.controllers:
        policy: ScoredPolicy = LearnedPolicy("adaptive", bundle)
        policy.recipe = ("adaptive", {})  # a session saved under it is the controller's for good
        return policy
    policy = RulePolicy()
    policy.reason = "no trained controller"
    policy.note = (
        "this model has no trained controller, so precisions are chosen by rule;"
        f" kvq train-controller {shlex.quote(str(bundle.path))} --text FILE trains one"
    )
    return policy


POLICIES = {"auto": auto}
