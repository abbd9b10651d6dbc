"""Damage against bytes: every arm at the same budgets on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvq.controller.evaluation.arms import Bytes, DamageMeter, oracle, shuffled, static_mix
from kvq.controller.evaluation.divergence import Given, Outcome, outcome, reference
from kvq.controller.evaluation.paired import interval
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import Policy, make_policy
from kvq.controller.training.texts import read_text, windows
from kvq.runtime.errors import CalibrationError, ContextError
from kvq.runtime.session.model import Model

FIXED = ("fp16", "int8", "k8v4", "int4", "int3", "int2")
SCORED = ("rule", "random", "paper", "adaptive")
ARMS = (*FIXED, "static", *SCORED, "shuffled", "oracle")
Progress = Callable[[int, int, str], None]


def chunks(model: Model, texts: list[Path], context: int, count: int) -> list[np.ndarray]:
    """`count` runs of `context` tokens, int64 [context] each, evenly spread over each of the texts in turn.

    Raises:
        CalibrationError: a text cannot be read or is shorter than one chunk.
        ContextError: the model's context is shorter than a chunk.
    """
    if context < 2:
        raise CalibrationError("a chunk of 1 token has none that another one foretells; give a larger --context")
    if context > model.architecture.context:
        raise ContextError(
            f"a chunk of {context} tokens does not fit into the model's context of {model.architecture.context};"
            " give a smaller --context"
        )
    found: list[np.ndarray] = []
    for i, path in enumerate(texts):
        share = count // len(texts) + (i < count % len(texts))
        found += windows(model.encode, read_text(path, "--text"), [context] * share, str(path))
    return found


def measure(
    model: Model,
    texts: list[np.ndarray],
    budgets: list[float],
    recent: int = 16,
    sink: int = 4,
    protect_bits: int | None = None,
    arms: Sequence[str] = ARMS[:-1],
    progress: Progress | None = None,
    each: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """All arms on all texts.

    Args:
        model: the loaded model.
        texts: int64 [context] each, of one length.
        budgets: total bits per value.
        recent, sink: newest and first tokens, protected at protect_bits in all arms, as in `Scorer`.
        arms: which of `ARMS` to measure; "shuffled" needs "adaptive", "oracle" torch. Those that the bundle lacks are
            left out.
        progress: called before each arm of each text, and at the end.
        each: called with the rows so far after each text; a long run that is cut short leaves something.

    Returns:
        Rows, see `_row`.
    """
    context = len(texts[0])
    scorer, shape = Scorer(model, recent, sink, protect_bits), model.architecture
    space = Bytes(shape.geometry, context, recent, sink, protect_bits or 8)
    for budget in budgets:
        space.check(budget)
    meter = DamageMeter(model.bundle, recent) if "oracle" in arms else None
    there = {"rule", "random", *model.bundle.manifest.controllers}
    policies = {name: make_policy(name, model.bundle) for name in SCORED if name in arms and name in there}
    plan = _plan(arms, list(policies), budgets)
    results: dict[tuple[str, float | None], list[Outcome]] = {}
    rows: list[dict[str, Any]] = []
    for number, ids in enumerate(texts):
        steps = _steps(progress, number, len(texts), len(plan) + 1, context)
        next(steps)  # that of the reference
        run = partial(outcome, scorer, ids, reference(scorer, ids))
        damage = meter(ids) if meter else np.empty(0)
        found = _outcomes(run, plan, policies, space, damage, number)
        for key, _, one in zip(plan, steps, found, strict=True):  # in this order: a step is told before it is done
            results.setdefault(key, []).append(one)
        rows = [_row(*key, context, space, outcomes) for key, outcomes in results.items()]
        if each:
            each(rows)
    if progress:
        progress(1, 1, f"context {context}, done")
    return rows


def _plan(arms: Sequence[str], scored: list[str], budgets: list[float]) -> list[tuple[str, float | None]]:
    """What is measured of each text, in order: arms with their budgets; "shuffled" follows the arm that it shuffles."""
    equal = ["static"] if "static" in arms else []
    for name in scored:
        equal += [name, "shuffled"] if name == "adaptive" and "shuffled" in arms else [name]
    equal += ["oracle"] if "oracle" in arms else []
    return [(name, None) for name in FIXED if name in arms] + [(name, budget) for budget in budgets for name in equal]


def _outcomes(
    run: Callable[..., Outcome],
    plan: list[tuple[str, float | None]],
    policies: dict[str, Policy],
    space: Bytes,
    damage: np.ndarray,
    number: int,
) -> Iterator[Outcome]:
    """What `run` gives for each arm of the plan on text `number`, of whose tokens the oracle knows the damage."""
    # A generator for each arm: what is drawn for one does not depend on which others are measured.
    mixing, shuffling = (np.random.default_rng([number, of]) for of in range(2))
    for arm, budget in plan:
        if budget is None:
            found = run(make_policy(arm))
        elif arm == "static":
            found = run(Given(static_mix(space, budget, mixing)))
        elif arm == "shuffled":
            found = run(Given(shuffled(space, found.bits, shuffling)))
        elif arm == "oracle":
            found = run(Given(oracle(space, budget, damage, DamageMeter.classes)))
        else:
            found = run(policies[arm], budget)
        yield found


def _steps(progress: Progress | None, number: int, texts: int, each: int, context: int) -> Iterator[None]:
    """Tells how far the work is before each of the `each` steps of text `number` of `texts`."""
    for step in range(each):
        if progress:
            progress(number * each + step, texts * each, f"context {context}, text {number + 1} of {texts}")
        yield


def _row(arm: str, requested: float | None, context: int, space: Bytes, found: list[Outcome]) -> dict[str, Any]:
    """What a table has of an arm."""
    kld = np.concatenate([o.kld for o in found])
    return {
        "arm": arm,
        "bits_requested": requested,
        "bits_measured": round(max(space.bits(o.used_nbytes) for o in found), 4),
        "bits_mean": round(float(np.mean([space.bits(o.used_nbytes) for o in found])), 4),
        "bits_with_slack": round(float(np.mean([space.bits(o.nbytes) for o in found])), 4),
        "context": context,
        "recent": space.recent,
        "sink": space.sink,
        "protect_bits": space.protect_bits,
        "texts": len(found),
        "kld_mean": float(kld.mean()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "top1": float(np.concatenate([o.same_top1 for o in found]).mean()),
        "perplexity": float(np.exp(np.concatenate([o.loss for o in found]).mean())),
        "kld_by_text": [float(o.kld.mean()) for o in found],
    }


def compare(rows: list[dict[str, Any]], arm: str = "adaptive", seed: int = 0) -> list[dict[str, Any]]:
    """Paired differences of mean KL, other arms minus `arm`, with 95 % bootstrap intervals over texts.

    "difference" in nats; positive means that `arm` is better, surely so where "low" is above zero.
    "factor" is the other arm's mean KL over this one's.
    """
    rng = np.random.default_rng(seed)
    found = []
    for row in rows:
        if row["arm"] != arm:
            continue
        mine = np.array(row["kld_by_text"])
        for other in rows:
            same = other["bits_requested"] == row["bits_requested"] and other["context"] == row["context"]
            if not same or other["arm"] == arm:
                continue
            difference = np.array(other["kld_by_text"]) - mine
            between = interval(difference, rng=rng)
            found.append(
                {
                    "context": row["context"], "bits_requested": row["bits_requested"], "arm": other["arm"],
                    "difference": between["mean"], "low": between["low"], "high": between["high"],
                    "factor": other["kld_mean"] / row["kld_mean"],
                }
            )  # fmt: skip
    return found
