"""Token features in streaming form: what the policies see, computed as tokens arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kvq.runtime.policy.base import TokenFeatures


class Seen(NamedTuple):
    """What a forward pass leaves behind of its tokens: what features are made of. Views, overwritten by the next pass.

    ids: int64 [tokens].
    residual: float32 [tokens, hidden], what the head takes.
    keys, values: float32 [layers, kv_heads, tokens, head_dim], rotated and centred.
    row_squares: float32 [tokens, heads], sums of squares of the last layer's attention rows; None: not asked for.
    entropy, confidence: float32 [tokens], of the next-token distribution; None: not asked for.
    """

    ids: np.ndarray
    residual: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    row_squares: np.ndarray | None
    entropy: np.ndarray | None
    confidence: np.ndarray | None


class RarityCounter:
    """R_t = -log((c(x_t) + 1) / (N + |V_obs| + 1)) with running counts (arXiv 2604.04722, section 3).

    c(x_t) counts earlier occurrences of the id, N the tokens seen before, |V_obs| the distinct
    ids among them: the first token of a text has rarity 0.
    """

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, np.int32)
        self.seen = 0
        self.distinct = 0

    def rarity(self, ids: np.ndarray) -> np.ndarray:
        """Rarities in nats, float32 [tokens], of the next ids int64 [tokens], each counting those before it."""
        earlier: np.ndarray = self.counts[ids]
        seen: int | np.ndarray = self.seen
        distinct: int | np.ndarray = self.distinct
        if len(ids) > 1:
            earlier = earlier + _occurrences_so_far(ids)
            first_time = earlier == 0
            seen = seen + np.arange(len(ids))
            distinct = distinct + np.cumsum(first_time) - first_time
        return (np.log(seen + distinct + 1.0) - np.log(earlier + 1.0)).astype(np.float32)

    def count(self, ids: np.ndarray) -> None:
        """Take the ids, int64 [tokens], into the counts."""
        once = ids if len(ids) == 1 else np.unique(ids)
        self.distinct += int(len(once) - np.count_nonzero(self.counts[once]))
        np.add.at(self.counts, ids, 1)
        self.seen += len(ids)


def _occurrences_so_far(ids: np.ndarray) -> np.ndarray:
    """For each entry, how often its id stands before it in the same array; int64 [tokens]."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    run_start = np.maximum.accumulate(np.where(np.r_[True, ordered[1:] != ordered[:-1]], np.arange(len(ids)), 0))
    result = np.empty(len(ids), np.int64)
    result[order] = np.arange(len(ids)) - run_start
    return result


def attention_variance(row_squares: np.ndarray, row_length: np.ndarray) -> np.ndarray:
    """Variance of attention rows, mean over heads, float32 [tokens].

    A row sums to one, so its variance needs only the sum of its squares and its length.

    Args:
        row_squares: float32 [tokens, heads].
        row_length: int [tokens], number of weights in the row.
    """
    length = np.asarray(row_length, np.float32)
    return row_squares.sum(axis=1) / row_squares.shape[1] / length - 1.0 / length**2


class OpenTokens:
    """Features of the newest tokens, kept until their precision is chosen.

    Args:
        reads: names of the fields of `TokenFeatures` that will be asked for.
        room: most tokens.

    Attributes:
        keeps: names of those that have to be kept; positions are known anyway.
    """

    def __init__(self, reads: Iterable[str], room: int) -> None:
        self.room = room
        self.keeps = sorted({*reads} - {"positions"})
        self._arrays: dict[str, np.ndarray] = {}
        self._rows: list[list[tuple[str, np.ndarray]]] = []  # the same, token by token

    def keep(self, row: int, features: TokenFeatures) -> None:
        """Take the features of a single token as number `row`."""
        if not self._rows:
            self._make(features)
        for name, kept in self._rows[row]:
            kept[...] = features.get(name)

    def _make(self, features: TokenFeatures) -> None:
        """Room for features like these; the token's axis is the third of keys and values, else the first."""
        axes = {name: 2 if features.get(name).ndim == 4 else 0 for name in self.keeps}
        for name, axis in axes.items():
            one = features.get(name)
            self._arrays[name] = np.zeros((*one.shape[:axis], self.room, *one.shape[axis + 1 :]), one.dtype)
        for row in range(self.room):
            at = slice(row, row + 1)
            self._rows.append([(n, a[:, :, at] if axes[n] else a[at]) for n, a in self._arrays.items()])

    def features(self, start: int, rows: int) -> TokenFeatures:
        """Features of the first `rows` tokens, as views; the first of them stands at position `start`."""
        kept = {n: a[:, :, :rows] if a.ndim == 4 else a[:rows] for n, a in self._arrays.items()}
        return TokenFeatures(np.arange(start, start + rows), **kept)
