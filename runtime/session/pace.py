"""The pace of drafting: how many tokens are worth a pass, by what passes cost here and how drafts have fared."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

SIZES = (2, 4, 8, 16)  # tokens of a pass, the one that is certain among them
# What a pass costs in single steps before one was timed (SmolLM2-135M in int8 weights, two cores, rounded up).
COSTS = {1: 1.0, 2: 1.4, 4: 1.75, 8: 2.4, 16: 3.4, 32: 5.0, 64: 8.6}
NEWEST = 9  # times of a kind, whose median counts: a busy machine has outliers
LEAST = 0.5  # of what it costs beyond a step by COSTS, a pass costs at least: times may be those of a busy moment
SHORTEST = 1e-6  # seconds of a step
# What may be lost: so many steps, and so much of every step. A loss beyond needs a gain before.
STAKE, SHARE = 1.5, 0.005
MOST_STAKE = 8.0  # so much of a gain is put at stake again
MOST_COST = 3.0  # times the usual cost that one pass is charged: what lasted longer, the machine did
# A guess that was right, behind so many tokens that agreed, would have been a gain: so much of it may be lost.
CERTAIN, SEEN_GAIN = 6, 0.5
GAIN = 1.05  # tokens a step at which a pass is worth its work
# By tokens that agree: how likely a draft's next token is, before any was seen; and how many seen ones that counts for.
LIKELY = {0: 0.35, 2: 0.3, 3: 0.4, 4: 0.55, 6: 0.75, 9: 0.9}
WEIGHT = 2.0
FADING = 0.9  # of what was seen, with every further pass or guess


class Pace:
    """Chooses the number of drafted tokens so that a pass yields more tokens a second than single steps do.

    The likelihood of a drafted token is learned apart for short and long agreement, and fades, so that it follows the
    text; steps without a draft teach it for nothing, by what a draft would have begun with. Costs are measured, as is
    what drafting has brought: an account in steps, out of which passes that may fail are paid. Where that is empty
    there are none, so a text without luck takes at most `STAKE` steps and the share `SHARE` longer.

    Where sessions share passes nobody's own time can be measured: steps are then parts of a pass, costs the usual ones.

    Attributes:
        account: steps that may be lost.
    """

    def __init__(self) -> None:
        self.account = STAKE
        self._steps = deque[float](maxlen=NEWEST)  # seconds
        self._passes: dict[int, deque[float]] = {}
        self._seen = {least: [0.0, 0.0] for least in LIKELY}  # tokens that were right, and that were tried

    def cost(self, size: int, sessions: int = 1) -> float:
        """What so many tokens of a pass cost, in single steps; where several sessions share it, in their part of one.

        What all of them wait longer for drafted tokens is put down to who drafts.
        """
        if sessions > 1:
            return 1 + (_usual(sessions + size - 1) - _usual(sessions)) * sessions / _usual(sessions)
        usual = _usual(size)
        if size not in self._passes or not self._steps:
            return usual
        return max(1 + LEAST * (usual - 1), median(self._passes[size]) / max(median(self._steps), SHORTEST))

    def likely(self, agreeing: int) -> float:
        """How likely the next token of a draft is right."""
        least = _class(agreeing)
        right, tried = self._seen[least]
        return (right + WEIGHT * LIKELY[least]) / (tried + WEIGHT)

    def size(self, agreeing: int, most: int, sessions: int = 1) -> int:
        """Tokens of the next pass, one of `SIZES` up to `most`; 1: a single step is better.

        agreeing: tokens before the draft that agree, as `Lookup.find` says; 0: it goes on behind a wrong one.
        sessions: share the pass.
        """
        p, best, found = self.likely(agreeing), GAIN, 1
        for size in SIZES:
            cost = self.cost(size, sessions)
            # A part of a shared pass is little time, and what drafts cost there is many parts: one trial may overdraw.
            spent = cost - 1 > self.account if sessions == 1 else self.account <= 0
            if size > most or spent:
                break
            gain = (1 - p**size) / (1 - p) / cost
            if gain > best:
                best, found = gain, size
        return found

    def guessed(self, agreeing: int, right: bool) -> None:
        """The first token that a draft would have had was right or wrong."""
        self._see(agreeing, int(right), 1)
        if right and agreeing >= CERTAIN and self.account < STAKE:
            self.account = min(STAKE, self.account + SEEN_GAIN)

    def stepped(self, seconds: float | None) -> None:
        """A single step took so long; None: others shared it."""
        if seconds is not None:
            self._steps.append(seconds)
        self._earn(SHARE)

    def passed(self, size: int, seconds: float) -> None:
        """A pass took so long."""
        self._passes.setdefault(size, deque(maxlen=NEWEST)).append(seconds)

    def learn(self, agreeing: int, size: int, right: int, seconds: float | None, sessions: int = 1) -> None:
        """Of a pass's drafted tokens, size - 1, the first so many were right.

        It took so long; where `sessions` shared it nobody knows what it took for one of them: None.
        """
        self._see(agreeing, right, min(right + 1, size - 1))
        cost = usual = self.cost(size, sessions)
        if seconds is not None and self._steps:
            cost = min(max(usual, seconds / median(self._steps)), MOST_COST * usual)
        self._earn(1 + right - cost)

    def _see(self, agreeing: int, right: int, tried: int) -> None:
        seen = self._seen[_class(agreeing)]
        seen[0] = seen[0] * FADING + right
        seen[1] = seen[1] * FADING + tried

    def _earn(self, steps: float) -> None:
        self.account = min(MOST_STAKE, self.account + steps)


def _usual(rows: int) -> float:
    """What a pass of so many rows costs before one was timed, in single steps."""
    found: float = np.interp(rows, list(COSTS), list(COSTS.values()))
    return found * max(1.0, rows / max(COSTS))


def _class(agreeing: int) -> int:
    return max(least for least in LIKELY if least <= agreeing)
