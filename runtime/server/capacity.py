"""Bounds on the bytes of a session's KV store, known before its tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvq.controller.budget import page_room, token_bytes
from kvq.runtime.codecs import CODECS
from kvq.runtime.pages import FIRST_PAGE_TOKENS, LAST_PAGE_TOKENS

if TYPE_CHECKING:
    from kvq.runtime.session import Session
    from kvq.runtime.store import KVStore

SINK = (16, 16)


class Capacity:
    """What a session with these settings can take up, in bytes.

    Args:
        session: any session of the settings; only its policy, budget and shapes are looked at.

    Attributes:
        private_nbytes: most bytes that a fork does not share with what it was made of: window and open pages.
    """

    def __init__(self, session: Session) -> None:
        geometry = session.store.geometry
        pairs = {tuple(int(b) for b in pair) for pair in _choices(session)} | ({SINK} if session.store.sink else set())
        self._token_bytes = {pair: token_bytes(geometry, pair) for pair in pairs}
        self._window = session.store.window.nbytes
        self._recent = session.store.window.capacity
        self._sink = min(session.store.sink, session.model.architecture.context)
        self._budget = session.budget
        self._room = page_room(session.model.architecture.context + 1)
        self._pages = LAST_PAGE_TOKENS * sum(self._token_bytes.values())  # a page of every pair
        self.private_nbytes = self._window + self._pages

    def most_nbytes(self, length: int) -> int:
        """Most bytes of a store that holds up to `length` tokens, on its own."""
        stored = min(max(0, length - self._recent), len(self._room) - 1)
        widest = max(self._token_bytes.values())
        if len(self._token_bytes) == 1:
            most = self._window + widest * int(self._room[stored])
        else:
            # However the tokens fall to the pairs, the free room of a pair's pages is less than its last page.
            slack = min(LAST_PAGE_TOKENS, max(FIRST_PAGE_TOKENS, stored)) - 1
            most = self._window + widest * stored + slack * sum(self._token_bytes.values())
        if self._budget is not None and self._budget.limits_memory:
            most = min(most, int(self._budget.allowed(length)))
        return most

    def growth(self, store: KVStore, tokens: int) -> int:
        """Most bytes that appending so many tokens adds to a store and to those it shares pages with."""
        widest = max(self._token_bytes.values())
        pages = -(-tokens // LAST_PAGE_TOKENS) * LAST_PAGE_TOKENS * widest + (self._pages if tokens > 1 else 0)
        copies = self._pages if open_shared(store) else 0
        return copies + min(pages, max(0, self.most_nbytes(store.length + tokens) - store.nbytes))


def open_shared(store: KVStore) -> int:
    """Buckets whose open page is shared: appending to one copies it."""
    return sum(bool(bucket.pages) and bucket.pages[-1].shared for bucket in store.buckets.values())


def _choices(session: Session) -> np.ndarray:
    """Every (key bits, value bits) pair that the policy may choose, [pairs, 2]."""
    classes = session.policy.classes
    return np.array([(k, v) for k in CODECS for v in CODECS]) if classes is None else classes
