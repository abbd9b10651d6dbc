"""Bounds on the bytes of a session's KV store, known before its tokens are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.kv.pages import PAGE_TOKENS, BucketBytes
from kvq.runtime.precision.table import PROTECTED, Pair, pairs
from kvq.runtime.session.several import alike_however_fed

if TYPE_CHECKING:
    from kvq.runtime.kv.store import KVStore
    from kvq.runtime.session.session import Session


class Capacity:
    """What a session with these settings can take up, in bytes.

    Args:
        session: any session of the settings; only its policy, budget and shapes are looked at.

    Attributes:
        policy, budget: the session's, for others of these settings.
        alike: what they hold does not depend on how tokens are fed, see `alike_however_fed`.
    """

    def __init__(self, session: Session) -> None:
        self.policy, self.budget = session.policy, session.budget
        self.alike = alike_however_fed(session)
        store, context = session.store, session.model.architecture.context
        chosen = {Pair(int(k), int(v)) for k, v in _choices(session)}
        self._token_bytes = {pair: store.geometry.token_bytes(pair) for pair in chosen}
        self._bucket_bytes = {pair: BucketBytes(pair, store.geometry) for pair in chosen}
        self._sink_pair = PROTECTED[store.protect_bits]
        self._sink_bytes = store.geometry.token_bytes(self._sink_pair)
        self._sunk_bytes = BucketBytes(self._sink_pair, store.geometry)
        self._empty, self._recent, self._sink = store.empty_nbytes, store.recent, min(store.sink, context)
        self._context = context

    def most_nbytes(self, length: int) -> int:
        """Most bytes of a store that holds up to `length` tokens, on its own."""
        stored = min(max(0, length - self._recent), self._context + 1)
        widest = max(self._token_bytes.values())
        most = self._empty
        if self._sink_pair not in self._token_bytes:  # else sink tokens lie among those that the policy gives as much
            sunk = min(stored, self._sink)
            most += self._sunk_bytes[sunk]
            stored -= sunk
        if len(self._token_bytes) == 1:
            most += next(iter(self._bucket_bytes.values()))[stored]
        else:  # however the tokens fall to the pairs
            most += widest * stored + sum(of_pair.most_free for of_pair in self._bucket_bytes.values())
        if self.budget is not None and self.budget.limits_memory:
            most = min(most, int(self.budget.allowed(length)))
        return most

    def growth(self, store: KVStore, tokens: int) -> int:
        """Most bytes that appending so many tokens adds to a store and to those it shares pages with."""
        pages = self._pages(store, tokens)
        return store.growing_nbytes(shared=True) + min(pages, self.most_nbytes(store.length + tokens) - store.nbytes)

    def growth_by_cutting(self, store: KVStore) -> int:
        """Most bytes that trimming a store adds beside those it shares pages with: a page of each pair, its window."""
        return store.fork_nbytes + store.growing_nbytes(shared=True) + self._pages(store, 2 + self._recent)

    def _pages(self, store: KVStore, tokens: int) -> int:
        """Bytes of the pages that so many tokens may begin, and of the tokens."""
        each = dict(self._token_bytes)
        if store.bucketed < self._sink or tokens > 1:  # sink tokens are still to leave the window, or may have to again
            each[self._sink_pair] = self._sink_bytes
        widest = max(each.values())
        return PAGE_TOKENS * (widest if tokens == 1 else sum(each.values())) + widest * (tokens - 1)


def _choices(session: Session) -> np.ndarray:
    """Every pair that the policy may choose, [pairs, 2]."""
    classes = session.policy.classes
    return np.array(pairs()) if classes is None else classes


def quarter_of_memory() -> int:
    """A quarter of the machine's memory, bytes; where the system does not tell, of 4 GB."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return 1_000_000_000
