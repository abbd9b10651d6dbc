"""Milliseconds of a decode step by policy and cached tokens, all arms in turn within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvq.controller.evaluation.filler import Filler
from kvq.runtime.errors import CalibrationError
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session

# Turns of each arm, of which the first is not counted, and steps of a turn, of which the first is not: it finds the
# processor's caches full of another arm. The others are as many as the window has tokens unless told otherwise, so that
# what a policy does now and then is in every turn.
ROUNDS, STEPS = 9, 17


def room(model: Model) -> int:
    """Cached tokens that leave a model's context room for what is decoded behind them."""
    return model.architecture.context - ROUNDS * STEPS


def check(model: Model, lengths: Sequence[int]) -> None:
    """Raise CalibrationError where a model has no room for a text of one of these lengths."""
    if lengths and max(lengths) > room(model):
        raise CalibrationError(
            f"{model.bundle.manifest.name} has room for {room(model)} cached tokens and {ROUNDS * STEPS} to decode;"
            f" leave out {max(lengths)}"
        )


def measure(
    model: Model,
    arms: Sequence[tuple[str, dict[str, Any]]],
    lengths: Sequence[int],
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """Time of a step of every arm behind texts of some lengths.

    All arms read the same made-up sentences and go on with the same tokens. They take turns of a few steps, in an order
    that moves on by one each round, so that whatever else the machine does is everybody's.

    Args:
        model: the loaded model.
        arms: policy names with further arguments of `Model.session`; the first is the reference.
        lengths: tokens that are cached before the first step.
        progress: gets what is done, of how much, and what it is.

    Returns:
        Rows with "cached" (tokens), arm and its arguments, "ms" of a step (median of the rounds), "ms_quartiles",
        "bits" (of the cache, measured, free room of pages not counted), and for all arms but the first "of_first", the
        median of its time over the first arm's of the same round with "low" and "high", quartiles.

    Raises:
        CalibrationError: as `check`.
    """
    check(model, lengths)
    rows: list[dict[str, Any]] = []
    for place, length in enumerate(lengths):
        ids = _text(model, length + ROUNDS * STEPS)
        sessions = []
        for i, (policy, options) in enumerate(arms):
            progress(place * len(arms) + i, len(lengths) * len(arms), f"{length} tokens, {policy}")
            sessions.append(model.session(policy, **options))
            sessions[-1].append(ids[:length])
        times = _in_turn(sessions, ids[length:])
        rows += [_row(length, *arm, times, i, sessions[i]) for i, arm in enumerate(arms)]
    return rows


def _text(model: Model, tokens: int) -> list[int]:
    """As many tokens of made-up sentences."""
    ids: list[int] = []
    for sentence in Filler().draw(tokens, np.random.default_rng(0)):
        if len(ids) >= tokens:
            break
        ids += model.tokenizer.encode(sentence, add_special_tokens=False).ids
    return ids[:tokens]


def _in_turn(sessions: Sequence[Session], tokens: list[int]) -> np.ndarray:
    """Milliseconds of a step: float64 [counted rounds, sessions]."""
    times = np.empty((ROUNDS, len(sessions)))
    for turn in range(ROUNDS):
        first, *rest = tokens[turn * STEPS : (turn + 1) * STEPS]
        for i in np.roll(np.arange(len(sessions)), -turn).tolist():
            sessions[i].append([first])
            begun = time.perf_counter()
            for token in rest:
                sessions[i].append([token])
            times[turn, i] = 1e3 * (time.perf_counter() - begun) / len(rest)
    return times[1:]


def _row(
    length: int, policy: str, options: dict[str, Any], times: np.ndarray, place: int, session: Session
) -> dict[str, Any]:
    low, ms, high = np.percentile(times[:, place], [25, 50, 75])
    row = {
        "cached": length, "arm": policy, **options, "ms": round(ms, 3),
        "ms_quartiles": [round(low, 3), round(high, 3)], "bits": round(session.stats().kv_used_bits or 0.0, 3),
    }  # fmt: skip
    if place:
        low, middle, high = np.percentile(times[:, place] / times[:, 0], [25, 50, 75])
        row["of_first"] = {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
    return row
