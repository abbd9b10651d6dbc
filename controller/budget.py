"""A byte budget held by any scored policy: argmax_k (score_k - mu * bytes_k), never exceeded.

What is held: at every length n, the bytes of all arrays of the store - codes, scales, tags, the
free room of pages, the whole recent window and the sink - are at most

    allowed(n) = max(budget(n), least(n)),

where budget(n) is X * values(n) / 8 for ``kv_bits`` X (values(n): numbers held by n tokens) or SIZE
for ``kv_memory``, and least(n) are the bytes of the same store with every unprotected token in the
policy's cheapest class. The second term only matters for short texts: a window of 16 tokens and the first page
cost the same for 1 token as for 32, so no choice of precision could go below it. While a text is
appended in one call, n is its length at the end of the call: a prompt may spend early what it
saves later.

mu comes from the policy's curve of mean bytes against mu (measured where the policy was trained)
at the rate of spending that would use up what is left, so it follows the text without any state:
everything is computed from the counts of stored tokens, and sessions can be trimmed and forked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from kvq.controller.policies.base import ScoredPolicy
from kvq.runtime.codecs import CODECS
from kvq.runtime.errors import BudgetError
from kvq.runtime.pages import FIRST_PAGE_TOKENS, LAST_PAGE_TOKENS, Bits, Geometry
from kvq.runtime.store import KVStore, RecentWindow

# Tokens over which a surplus or a debt is worked off while decoding: short enough to follow a text,
# long enough not to chase single tokens.
HORIZON = 64
PROTECTED = (16, 16)


def token_bytes(geometry: Geometry, pair: tuple[int, int]) -> int:
    """Bytes of one stored token: codes and scales of all layers and heads, and its position tag."""
    vectors = geometry.layers * geometry.kv_heads
    return vectors * sum(CODECS[bits].vector_bytes(geometry.head_dim) for bits in pair) + 4


def page_room(most: int) -> np.ndarray:
    """Tokens that the pages of a bucket have room for when it holds 0, 1, ..., most; int64 [most + 1].

    The growth of `kvq.runtime.pages.Bucket`, which a test compares with this.
    """
    room = np.zeros(most + 1, np.int64)
    capacity = 0
    while capacity < most:
        room[capacity + 1 :] = capacity = capacity + min(max(FIRST_PAGE_TOKENS, capacity), LAST_PAGE_TOKENS)
    return room


class Store(Protocol):
    """What a budget must know of a store."""

    @property
    def length(self) -> int: ...

    def counts(self, pairs: list[tuple[int, int]]) -> np.ndarray: ...


def committed(store: KVStore, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Tokens of each pair, int64 [pairs]: those in buckets, and those in the window by what they will become."""
    found = np.zeros(len(pairs), np.int64)
    for pair, bucket in store.buckets.items():
        found[pairs.index((pair.k, pair.v))] += bucket.count
    window = store.window
    if window.count:
        slots = window.slots(store.length - window.count, store.length)
        for pair, n in zip(*np.unique(window.bits[slots], axis=0, return_counts=True), strict=True):
            found[pairs.index((int(pair[0]), int(pair[1])))] += n
    return found


class Budget:
    """The bytes a session may use, and the choice of precision that keeps to them.

    Args:
        policy: gives scores and the curve.
        geometry: of the store.
        context: most tokens a session can hold.
        recent, sink: tokens protected at 16 bits; both count.
        kv_bits: total bits per stored value, or
        kv_memory: bytes of the whole store. One of the two.

    Raises:
        BudgetError: not exactly one limit, or one that no choice of precision can keep.
    """

    def __init__(
        self,
        policy: ScoredPolicy,
        geometry: Geometry,
        context: int,
        recent: int,
        sink: int,
        *,
        kv_bits: float | None = None,
        kv_memory: int | None = None,
    ) -> None:
        if (kv_bits is None) == (kv_memory is None):
            raise BudgetError("give kv_bits or kv_memory, not both: they state the same budget in two ways")
        name, limit = ("kv_bits", kv_bits) if kv_memory is None else ("kv_memory", kv_memory)
        if isinstance(limit, bool) or not isinstance(limit, int | float | np.number) or not 0 < limit < float("inf"):
            raise BudgetError(f"{name} must be a positive number, got {limit!r}")
        self.policy, self.geometry, self.context = policy, geometry, context
        self.recent, self.sink = recent, sink
        classes = [(int(k), int(v)) for k, v in policy.classes]
        self.classes = len(classes)
        # The sink's own bucket goes last unless the policy has it as a class.
        self.pairs = classes if PROTECTED in classes else [*classes, PROTECTED]
        self.sink_pair = self.pairs.index(PROTECTED)
        self.bytes = np.array([token_bytes(geometry, pair) for pair in self.pairs], np.int64)
        self.least = int(np.argmin(self.bytes[: self.classes]))
        self.fixed = RecentWindow(geometry, recent).nbytes
        values = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim
        self.per_token = float(kv_bits) * values / 8 if kv_bits is not None else 0.0
        self.constant = float(kv_memory) if kv_memory is not None else 0.0
        self.room = page_room(context + 1)
        sunk = min(sink, context)
        room = self.bytes[self.least] * self.room
        lengths = np.arange(context + 1)
        buckets = np.maximum(0, lengths - recent)  # tokens outside the window
        self._least_bytes = (
            self.fixed
            + self.bytes[self.sink_pair] * self.room[np.minimum(buckets, sunk)]
            + room[np.maximum(0, buckets - sunk)]
        )
        # The most that c cheapest tokens, and any number of further ones, ever need beyond what the
        # budget grows by meanwhile: max over j >= c of room[j] - per_token * (j - c).
        slope = self.per_token * np.arange(context + 2)
        self._need = np.maximum.accumulate((room - slope)[::-1])[::-1] + slope
        bits, mu = policy.curve(self.bytes[: self.classes])
        self._curve_bytes, self._curve_mu = bits, mu
        self._check_possible(name, limit)

    def _check_possible(self, name: str, limit: float) -> None:
        """Refuse what cannot be kept at any length."""
        if self.constant:
            if self._least_bytes[-1] > self.constant:
                raise BudgetError(
                    f"kv_memory {int(limit)} is below what a full context of {self.context} tokens needs at the lowest"
                    f" precision, {int(self._least_bytes[-1])} bytes; give more, or a smaller recent window"
                )
            return
        lengths = np.arange(1, self.context + 1)
        possible = np.flatnonzero(self._least_bytes[1:] <= self.per_token * lengths)
        if not len(possible):
            best = (self._least_bytes[1:] / lengths).min() * limit / self.per_token
            raise BudgetError(
                f"kv_bits {limit:g} is below what is possible, {best:.2f} at a full context of {self.context} tokens"
                f" with {self.recent} recent and {self.sink} sink tokens at 16 bits; give more, or protect fewer"
            )

    def allowed(self, length: int) -> float:
        """Most bytes that the store may have at that length; see the module's definition."""
        return max(self.per_token * length + self.constant, float(self._least_bytes[length]))

    def choose(self, scores: np.ndarray, counts: np.ndarray, length: int, end: int) -> np.ndarray:
        """Precision of the next tokens.

        Args:
            scores: float32 [tokens, classes], of the tokens at the positions length, length + 1, ...
            counts: int64 [pairs], tokens chosen so far (see `committed`).
            length: their number.
            end: length the text will have when the call that appends these tokens ends.

        Returns:
            uint8 [tokens, 2], key and value bits.
        """
        counts = counts.copy()
        chosen = np.empty(len(scores), np.int64)
        for row, score in enumerate(scores):
            at = length + row
            if at < self.sink:  # the store raises it to 16 bits whatever is chosen
                chosen[row] = self.sink_pair
            else:
                chosen[row] = self._choose(score, counts, at, end)
            counts[chosen[row]] += 1
        return np.asarray(self.pairs, np.uint8)[chosen]

    def _choose(self, score: np.ndarray, counts: np.ndarray, at: int, end: int) -> int:
        """Class of the token at position `at`."""
        due = min(max(end, at + 1 + self.recent), self.context)  # the length at which the budget must hold
        before = max(due - self.recent - at - 1, 0)  # further tokens in buckets by then
        held = self.bytes * self.room[counts]
        least = self.least
        free = self.per_token * due + self.constant - self.fixed - float(held.sum()) + float(held[least])
        # What is left after each choice, if all further tokens take the cheapest class.
        after = free - self.bytes[: self.classes] * (
            self.room[counts[: self.classes] + 1] - self.room[counts[: self.classes]]
        )
        reserve = self._need[min(counts[least] + before, self.context + 1)]
        more = self._need[min(counts[least] + before + 1, self.context + 1)]
        fits = after >= reserve
        fits[least] = free >= more
        if not fits.any():
            return least
        goal = min(max(end, at + 1 + self.recent + HORIZON), self.context)
        tokens = max(goal - self.recent - at, 1)
        rate = (self.per_token * goal + self.constant - self.fixed - float(held.sum())) / tokens
        mu = np.interp(rate, self._curve_bytes, self._curve_mu)
        value = score - mu * self.bytes[: self.classes]
        value[~fits] = -np.inf
        return int(value.argmax())


def pairs_of(bits: Iterable[Bits]) -> list[tuple[int, int]]:
    """Plain tuples."""
    return [(pair.k, pair.v) for pair in bits]
