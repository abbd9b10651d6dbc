"""The chooser: precisions for the tokens of one session, by its policy and within its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvq.runtime.errors import PolicyError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.base import FEATURE_NAMES, Policy, ScoredPolicy, TokenFeatures
from kvq.runtime.policy.budget import Budget
from kvq.runtime.policy.features import OpenTokens, RarityCounter, Seen, attention_variance
from kvq.runtime.precision.codecs import CODECS

# Most decoded tokens whose precision is open at a time; a multiple of what controllers compute at once.
MOST_OPEN = 16


class Chooser:
    """Chooses the precision of every token, at once or, of single tokens in the recent window, when it is needed.

    A learned policy costs less a token where many are chosen for at once. So a single token may be left open: what
    the policy will look at is kept here, and the store asks `settle` before the token leaves the window, is forked,
    trimmed, saved or looked at. Nobody else has to know.

    Args:
        policy: chooses.
        vocab: ids there are, for rarity.
        recent: tokens of the recent window: no more can be open.
        budget: kept to where the policy has scores; None: the policy decides alone.
        sees: tokens that one sees in the last layer, of whose rows the attention variance is; 0: all.

    Attributes:
        policy, budget: as given; a budget made for the same settings may be put in while nothing is stored.
        observer: called with all features of every pass's tokens, which are then computed whatever the policy needs;
            arrays are views that the next pass overwrites. None, as it is at first, costs nothing.
    """

    def __init__(self, policy: Policy, vocab: int, recent: int, budget: Budget | None = None, sees: int = 0) -> None:
        self.policy = policy
        self._sees = sees
        self.budget = budget
        self.observer: Callable[[TokenFeatures], None] | None = None
        self._vocab = vocab
        self._rarity = RarityCounter(vocab)
        self._open = OpenTokens(policy.reads or (), min(MOST_OPEN, recent))

    @property
    def needs(self) -> frozenset[str]:
        """The features to compute, a subset of `FEATURE_NAMES`."""
        return self.policy.needs if self.observer is None else frozenset(FEATURE_NAMES)

    def restart(self, tokens: list[int]) -> None:
        """Go on behind this text; its tokens are chosen for already."""
        self._rarity = RarityCounter(self._vocab)
        self._rarity.count(np.asarray(tokens, np.int64))

    def count(self, ids: np.ndarray) -> None:
        """Take ids, int64 [tokens], that are stored now into the statistics of the text."""
        if "rarity" in self.needs:
            self._rarity.count(ids)

    def choose(self, store: KVStore, seen: Seen, end: int) -> np.ndarray | None:
        """Pairs of the tokens that come next in the store, uint8 [tokens, 2]; None leaves that of a single one open.

        Args:
            store: before them.
            seen: what the pass over them has left behind.
            end: length the text will have when the call that appends them is done.

        Raises:
            PolicyError: the policy chose what does not exist.
        """
        if self.observer is not None:
            self.observer(self._features(store.length, seen))
        room = self._open.room
        if self.policy.reads is None or not room or end != store.length + 1:
            store.settle()
            return self._chosen(store, self._for_policy(store.length, seen), end)
        if store.window.open == room:
            store.settle()
        if self._open.keeps:
            self._open.keep(store.window.open, self._for_policy(store.length, seen))
        return None

    def settle(self, store: KVStore, start: int, tokens: int) -> np.ndarray:
        """Pairs of the tokens left open, uint8 [tokens, 2]: so many from position `start` on; `KVStore.choose_open`."""
        # A budget counts bytes at the end of the call that appends, which for single tokens is right after them.
        return self._chosen(store, self._open.features(start, tokens), start + 1)

    def _for_policy(self, length: int, seen: Seen) -> TokenFeatures:
        """What the policy may look at: what it does not need is None, observed or not."""
        features = self._features(length, seen)
        hidden: dict[str, Any] = dict.fromkeys(self.needs - self.policy.needs)
        return features._replace(**hidden) if hidden else features

    def _features(self, length: int, seen: Seen) -> TokenFeatures:
        positions = np.arange(length, length + len(seen.ids))
        squares, rows = seen.row_squares, positions + 1
        if self._sees:
            rows = np.minimum(rows, self._sees)
        return TokenFeatures(
            positions,
            seen.entropy,
            self._rarity.rarity(seen.ids) if "rarity" in self.needs else None,
            None if squares is None else attention_variance(squares, rows),
            seen.confidence,
            seen.ids,
            seen.residual,
            seen.keys,
            seen.values,
        )

    def _chosen(self, store: KVStore, features: TokenFeatures, end: int) -> np.ndarray:
        """The policy's choice, checked: policies may be anybody's. end: as in `Budget.choose`."""
        policy, budget = self.policy, self.budget
        if budget is not None and isinstance(policy, ScoredPolicy):
            return budget.choose(policy.score(features), budget.counts(store), int(features.positions[0]), end)
        chosen = np.asarray(policy.choose(features))
        if chosen.shape != (len(features.positions), 2) or not set(chosen.ravel().tolist()) <= CODECS.keys():
            raise PolicyError(
                f"policy {policy.name!r} chose {chosen!r:.80}; choose (key bits, value bits) for each of"
                f" {len(features.positions)} tokens from {sorted(CODECS)}"
            )
        return chosen.astype(np.uint8, copy=False)
