"""A byte budget held by any scored policy: argmax_k (score_k - mu * bytes_k), never exceeded.

What is held. At every length n the bytes of the store are at most

    allowed(n) = max(budget(max(n, L)), least(n)).

* ``kv_bits`` X: budget(n) = X * values(n) / 8, values(n) being the numbers that n tokens hold, and L is SHORT_TEXT: a
  shorter text may take what one of L tokens may. Bytes are those of the stored tokens, `KVStore.used_nbytes`: codes,
  scales, tags, and the protected tokens of window and sink. The free room of pages is no token's and not counted
  (`Stats.kv_bits` has it, `Stats.kv_used_bits` has not).
* ``kv_memory`` SIZE: budget(n) = SIZE, L is the context, and bytes are those of all arrays, `KVStore.nbytes`, with the
  whole window and the free room of pages.
* least(n) is what the store would take with every unprotected token in the cheapest class: where window and sink alone
  are over a small budget, no choice of precision can go below it. For kv_memory a SIZE below least(context) is refused,
  so there least(n) never decides.

n is the length at the end of the call that appends: a prompt may spend on its early tokens what
it saves on later ones. Appended token by token, the bound holds at every token. Trimming may cut a prompt
where it has spent and not yet saved; tokens then get the cheapest class until the bound holds again.

How it is spent. What the cheapest classes leave of budget(L) is the surplus. Nobody knows how long a text will be, and
early tokens are read longest, so a text that has come to p of L tokens should have spent the share (p / L) ** EARLY
of it: much at once, but never all. The tokens of one call share evenly what their part comes to. From L on the rate is
what would just use up what is left.

The price mu is read off the policy's curve (mean bytes against mu on typical text, measured where
the policy was made) at that rate. What a text really spends feeds back through what is left, so mu follows it, and
everything is a function of the counts of stored tokens: trimming and forking sessions need no state.
"""

from __future__ import annotations

import bisect
import math

import numpy as np

from kvq.runtime.errors import BudgetError
from kvq.runtime.keywords import is_real, real
from kvq.runtime.kv.pages import BucketBytes
from kvq.runtime.kv.store import KVStore
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.policy.base import Policy, ScoredPolicy
from kvq.runtime.precision.precision import MOST_ID
from kvq.runtime.precision.table import PROTECTED, Geometry, Pair, pairs

# Tokens over which a surplus is spent while decoding: short enough to follow a text, long enough
# not to chase single tokens.
HORIZON = 64
MOST_LIMIT = 1e18  # bits of a value, or bytes: more than any machine has; sums of it stay finite
# Tokens whose allowance a shorter text may use under kv_bits, and how early: see above. Tried on chats, no other values
# beside them: docs/measurements.md#budgets-in-short-texts.
SHORT_TEXT = 1024
EARLY = 0.5
# Points of a curve that are farther apart than this share of the rate wanted have nothing between them.
FAR_APART = 0.05
GOLDEN_RATIO = 0.6180339887498949


class Budget:
    """The bytes a session may use, and the choice of precision that keeps to them.

    Args:
        policy: a `ScoredPolicy`.
        geometry: of the store.
        context: most tokens a session can hold.
        recent, sink: protected tokens; both count.
        kv_bits: total bits per stored value, or
        kv_memory: bytes of the whole store. One of the two.
        short_text: tokens whose allowance a shorter text may use under kv_bits; 0: what it is allowed is always that of
            its own length.
        protect_bits: 8 or 16, of the protected tokens.

    Raises:
        BudgetError: a policy without scores, not exactly one limit, or one that no choice can keep.
    """

    def __init__(
        self,
        policy: Policy,
        geometry: Geometry,
        context: int,
        recent: int,
        sink: int = 0,
        *,
        kv_bits: float | None = None,
        kv_memory: float | None = None,
        short_text: int = SHORT_TEXT,
        protect_bits: int = 16,
    ) -> None:
        if kv_bits is not None and kv_memory is not None:
            raise BudgetError("give kv_bits or kv_memory, not both: each is a budget of its own")
        name, limit = ("kv_bits", kv_bits) if kv_memory is None else ("kv_memory", kv_memory)
        if not is_real(limit) or not 0 < real(limit) < MOST_LIMIT:
            raise BudgetError(f"{name} must be a positive number below {MOST_LIMIT:g}, got {limit!r:.60}")
        if not isinstance(limit, int):  # which stays one, as files of sessions have it
            kv_bits, kv_memory = (None if given is None else real(given) for given in (kv_bits, kv_memory))
        if not isinstance(policy, ScoredPolicy):
            raise BudgetError(
                f"policy {policy.name!r} has fixed precisions and cannot follow a budget; use adaptive, paper, rule"
                " or random"
            )
        self.context, self.recent, self.sink, self.protect_bits = context, min(recent, context), sink, protect_bits
        self.kv_bits, self.kv_memory = kv_bits, kv_memory
        classes = [Pair(int(k), int(v)) for k, v in policy.classes]
        if len({*classes}) < len(classes):
            raise BudgetError(f"policy {policy.name!r} has a class twice; a budget needs classes that differ")
        # The policy's own first; a loaded session may hold tokens of any other pair.
        self.pairs = list(dict.fromkeys([*classes, *pairs()]))
        self._sink_pair = self.pairs.index(PROTECTED[protect_bits])
        self._bytes = np.array([geometry.token_bytes(pair) for pair in self.pairs], np.int64)
        self._class_bytes = self._bytes[: len(classes)]
        self._least = int(np.argmin(self._class_bytes))
        self._index = np.zeros((MOST_ID + 1, MOST_ID + 1), np.int64)  # place in `pairs` by ids of keys and values
        for i, pair in enumerate(self.pairs):
            self._index[pair] = i
        window = RecentWindow(geometry, self.recent, protect_bits)
        self._window = window.nbytes if kv_bits is None else self.recent * window.token_bytes
        self._per_token = float(limit) * geometry.values / 8 if kv_memory is None else 0.0
        self._constant = 0.0 if kv_memory is None else float(limit)
        self._full = context if self._constant else min(short_text, context)
        # Bytes that c tokens of a pair take up, [pair][c]: their own, or those of their pages.
        self._taken = [
            BucketBytes(pair, geometry) if self._constant else range(0, (context + 3) * each, each)
            for pair, each in zip(self.pairs, self._bytes.tolist(), strict=True)
        ]
        # Bytes of a cheapest token that a budget does not grow by with it, see `_need`.
        self._excess = 0.0 if self._constant else max(0.0, int(self._class_bytes.min()) - self._per_token)
        means, prices = policy.curve(self._class_bytes)
        self._curve = (np.asarray(means, float).tolist(), np.asarray(prices, float).tolist())
        self._nbytes = self._bytes.tolist()
        self._refuse_impossible(name, float(limit))

    def _refuse_impossible(self, name: str, limit: float) -> None:
        """Raise for a budget that cannot be kept at any length (kv_bits) or at full context (kv_memory)."""
        least = np.array([self.least(n) for n in (self.context // 2, self.context)])
        lengths = np.array([max(1, self.context // 2), self.context])
        if name == "kv_memory" and least[-1] > limit:
            raise BudgetError(
                f"kv_memory of {limit:.0f} bytes is below the {least[-1]:.0f} that a full context of {self.context}"
                " tokens takes at the lowest precision; give more"
            )
        if name == "kv_bits" and (least > self._per_token * lengths).all():
            lowest = (least / lengths).min() * limit / self._per_token
            raise BudgetError(
                f"kv_bits {limit:g} is below what is possible: {lowest:.2f} with a full context of {self.context}"
                f" tokens, {self.recent} recent and {self.sink} sink tokens at {self.protect_bits} bits; give more, or"
                " protect fewer"
            )

    @property
    def limits_memory(self) -> bool:
        """It bounds the bytes of all arrays (kv_memory), not those of the stored tokens alone (kv_bits)."""
        return self._constant > 0

    def least(self, length: int) -> float:
        """Bytes of a store of that length with every unprotected token in the cheapest class."""
        window = self._window
        if not self._constant and self.recent:
            window = window * min(length, self.recent) // self.recent
        buckets = max(0, length - self.recent)
        sunk = min(buckets, self.sink)
        return float(window + self._taken[self._sink_pair][sunk] + self._taken[self._least][buckets - sunk])

    def allowed(self, length: int) -> float:
        """Most bytes the store may have at that length; see the module's definition."""
        return max(self._per_token * max(length, self._full) + self._constant, self.least(length))

    def used(self, store: KVStore) -> int:
        """Bytes of a store as this budget counts them."""
        return store.nbytes if self._constant else store.used_nbytes

    def counts(self, store: KVStore) -> np.ndarray:
        """Tokens by pair, int64 [pairs]; those in the window by what they will become, open ones left out."""
        found = np.zeros(len(self.pairs), np.int64)
        for stored, bucket in store.buckets.items():
            found[self.pairs.index(stored)] += bucket.count
        window = store.window
        if window.count:
            due = window.chosen[window.slots(store.length - window.count, store.length - window.open)]
            found += np.bincount(self._index[due[:, 0], due[:, 1]], minlength=len(self.pairs))
        return found

    def choose(self, scores: np.ndarray, counts: np.ndarray, length: int, end: int) -> np.ndarray:
        """Precision of the next tokens, uint8 [tokens, 2].

        Args:
            scores: float32 [tokens, classes], of the tokens at the positions length, length + 1, ...
            counts: int64 [pairs], see `counts`; brought up to date in place.
            length: tokens chosen so far.
            end: length of the text when the call that appends these tokens is done.
        """
        # Plain numbers: at a few classes a token, numpy's calls would cost ten times the arithmetic.
        held, taken = counts.tolist(), self._taken
        total = sum(of_pair[c] for of_pair, c in zip(taken, held, strict=True))
        chosen = []
        for at, score in enumerate(scores.tolist(), length):
            # A sink token is protected by the store whatever is chosen here.
            one = self._sink_pair if at < self.sink else self._class(score, held, total, at, end)
            total += taken[one][held[one] + 1] - taken[one][held[one]]
            held[one] += 1
            chosen.append(one)
        counts[:] = held
        return np.asarray(self.pairs, np.uint8)[chosen]

    def _class(self, score: list[float], held: list[int], total: int, at: int, end: int) -> int:
        """Class of the token at position `at`; held and total: tokens by pair and bytes in buckets so far."""
        least, taken, nbytes = self._least, self._taken, self._nbytes
        # The length at which the bytes are counted.
        due = min(max(end, at + 1 + self.recent, self._full), self.context)
        further = max(due - self.recent - at - 1, 0)  # tokens after this one that are in buckets by then
        price = self._price(self._rate(total, at, end), at)
        # A choice fits if afterwards, from then on, the cheapest class for every token keeps the budget.
        free = self._per_token * due + self._constant - self._window - total + taken[least][held[least]]
        cheap = held[least] + further
        one_more, no_more = self._need(cheap + 1), self._need(cheap)
        best, highest = least, -math.inf
        for i, value in enumerate(score):
            of_class = taken[i]
            fits = free >= one_more if i == least else free - (of_class[held[i] + 1] - of_class[held[i]]) >= no_more
            value -= price * nbytes[i]
            if fits and value > highest:
                best, highest = i, value
        return best

    def _need(self, tokens: int) -> float:
        """Bytes that so many cheapest tokens need, and any that may follow beyond what a budget grows by with these.

        The largest of taken(j) - per_token * (j - tokens) over j from `tokens` to the end: of a line it is at an end.
        """
        return self._taken[self._least][tokens] + self._excess * (self.context + 2 - tokens)

    def _rate(self, total: int, at: int, end: int) -> float:
        """Bytes that the token at position `at` and those after it should take on average; total: in buckets so far."""
        goal = min(max(end, at + 1 + self.recent + HORIZON), self.context)
        tokens = max(goal - self.recent - at, 1)
        left = self._per_token * max(goal, self._full) + self._constant - self._window - total
        if goal >= self._full:
            return left / tokens
        cheapest, whole = self._nbytes[self._least], self._full - self.recent
        before, after = ((n / whole) ** EARLY for n in (at, goal - self.recent))  # shares of the surplus
        surplus = left - cheapest * (whole - at)  # that is still there
        return cheapest + surplus * (after - before) / (1 - before) / tokens

    def _price(self, rate: float, at: int) -> float:
        """Price of a byte for the token at position `at`, so that typical text takes `rate` bytes a token.

        Linear between close points of the curve. Where many tokens score alike, points are far apart and no price
        leads to a rate between them: then tokens take the prices of both in turn, by a golden-ratio sequence.
        """
        means, prices = self._curve
        i = bisect.bisect_right(means, rate)
        if i in (0, len(means)):
            return prices[min(i, len(means) - 1)]
        gap = means[i] - means[i - 1]
        share = (rate - means[i - 1]) / gap
        if gap > FAR_APART * rate:
            return prices[i] if at * GOLDEN_RATIO % 1.0 < share else prices[i - 1]
        return prices[i - 1] + (prices[i] - prices[i - 1]) * share
