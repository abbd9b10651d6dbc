"""The runner of several sessions: one pass over what each of them has next, and one head for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import HEAD_ROWS, Head
from kvq.runtime.compute.joint import JointPass, Span
from kvq.runtime.compute.logits import not_usable, usable
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.features import Seen

if TYPE_CHECKING:
    from kvq.runtime.compute.backends.base import AttentionBackend


@dataclass(frozen=True, eq=False)
class Run:
    """What a session wants of a pass; see `Runner.run`, which `alone` is of that session's."""

    backend: AttentionBackend
    ids: np.ndarray
    store: KVStore
    stepwise: bool
    needs: frozenset[str]
    skip: int
    logits: np.ndarray
    alone: Callable[[], Seen]


class JointRunner:
    """Runs the tokens of several sessions through the model together. One thread at a time.

    Args:
        engine: the model's graphs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._joint: dict[tuple[str, int], tuple[JointPass, Head]] = {}

    def run(self, runs: Sequence[Run]) -> list[Seen | Exception]:
        """A pass over the tokens of all runs, whose stores are different ones; none is changed.

        Returns:
            What each leaves behind, until the next pass; or the error that it came to: others have no part in it.
        """
        found: dict[int, Seen | Exception] = {}
        kinds: dict[tuple[str, int], list[int]] = {}
        for number, run in enumerate(runs):
            kinds.setdefault(run.backend.joins, []).append(number)
        for kind, numbers in kinds.items():
            found |= self._run_kind(kind, {number: runs[number] for number in numbers})
        return [found[number] for number in range(len(runs))]

    def _run_kind(self, kind: tuple[str, int], runs: dict[int, Run]) -> dict[int, Seen | Exception]:
        """The same for runs that can share a pass, by number."""
        if kind not in self._joint:
            backend = next(iter(runs.values())).backend
            self._joint[kind] = backend.joint_pass(self._engine), backend.head(self._engine, HEAD_ROWS)
        layers, head = self._joint[kind]
        spans: dict[int, Span] = {}
        found: dict[int, Seen | Exception] = {}
        try:
            for number, run in runs.items():
                span = Span(run.backend, run.ids, run.store, run.stepwise, self._squares(run))
                if layers.takes(span):
                    spans[number] = span
            if spans:
                residual = layers.forward(list(spans.values()))
                found |= _through_head(head, residual, spans, runs)
        except Exception:  # nothing is changed yet: whose fault it is shows when each goes alone
            found.clear()
        for number, run in runs.items():
            if number not in found:
                try:
                    found[number] = run.alone()
                except Exception as error:
                    found[number] = error
        return found

    def _squares(self, run: Run) -> np.ndarray | None:
        if "attention_variance" not in run.needs:
            return None
        return np.empty((len(run.ids), self._engine.architecture.heads), np.float32)


def _through_head(
    head: Head, residual: np.ndarray, spans: dict[int, Span], runs: dict[int, Run]
) -> dict[int, Seen | Exception]:
    """Logits, and what policies ask of them, of the rows that somebody wants; residual float32 [rows, hidden]."""
    found: dict[int, Seen | Exception] = {}
    parts: list[tuple[int, int, int, np.ndarray | None]] = []  # number, first row in the pass, of the run, uncertainty
    at = 0
    for number, span in spans.items():
        both = None
        if runs[number].needs & {"entropy", "confidence"}:
            both = np.empty((2, len(span.ids)), np.float32)
        parts.append((number, at, runs[number].skip if both is None else 0, both))
        entropy, confidence = (None, None) if both is None else both
        rows = residual[at : at + len(span.ids)]
        found[number] = Seen(span.ids, rows, span.keys, span.values, span.squares, entropy, confidence)
        at += len(span.ids)
    wanted = [
        (part, row) for part, (number, _, first, _) in enumerate(parts) for row in range(first, len(runs[number].ids))
    ]
    for begin in range(0, len(wanted), HEAD_ROWS):
        block = wanted[begin : begin + HEAD_ROWS]
        logits = head.logits(residual[[parts[part][1] + row for part, row in block]])
        all_usable = head.usable(len(block))
        uncertainty = head.uncertainty(len(block)) if any(parts[part][3] is not None for part, _ in block) else None
        for i, (part, row) in enumerate(block):
            number, _, _, both = parts[part]
            run = runs[number]
            if both is not None and uncertainty is not None:
                both[:, row] = uncertainty[0][i], uncertainty[1][i]
            if row >= run.skip:
                run.logits[row - run.skip] = logits[i]
            if not all_usable and not usable(logits[i]):
                found[number] = not_usable()
    return found
