"""Step-by-step results at the speed of blocks: scoring long texts through the quantized cache.

A token leaves the window of W recent ones W + 1 steps after it came. So a block of W + 1 tokens can
go through the model at once and still give what decoding token by token gives: every earlier token
that a row reads decoded has had its precision chosen before the block began. Each row reads
columns within W at the window's 16 bits, its own key and value exactly, and older ones as their
codec returns them. Features and choices come from the same rows, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvq.controller.budget import Budget
from kvq.controller.features import RarityCounter, attention_variance
from kvq.controller.policies import Policy, ScoredPolicy, TokenFeatures
from kvq.runtime.attention import make_backend
from kvq.runtime.engine import HEAD_ROWS, Head, SegmentedPass
from kvq.runtime.model import Model
from kvq.runtime.pages import Geometry
from kvq.runtime.store import KVStore


@dataclass
class Scored:
    """One text, scored.

    Attributes:
        bits: uint8 [tokens, 2], what each token was given.
        used_nbytes, nbytes: of a store that holds the text, without and with the free room of pages.
    """

    bits: np.ndarray
    used_nbytes: int
    nbytes: int


class BlockScorer:
    """Scores texts of one length through the cache, block by block.

    Args:
        model: the loaded model.
        length: tokens of a text.
        recent: newest tokens read at 16 bits.
    """

    def __init__(self, model: Model, length: int, recent: int = 16) -> None:
        shape = model.architecture
        self.model, self.length, self.recent = model, length, recent
        self.codecs = make_backend().codecs  # the same bytes whichever it is
        self.geometry = Geometry(shape.layers, shape.kv_heads, shape.head_dim)
        room = (shape.layers, shape.kv_heads, length, shape.head_dim)
        self._kept = np.empty((2, *room), np.float32)  # as the window keeps them
        self._seen = np.empty((2, *room), np.float32)  # as their codec returns them
        self._passes: dict[int, SegmentedPass] = {}
        self._before = KVStore(self.geometry, 0)  # stays empty: its length says where a block stands
        self._head = Head(model.engine, HEAD_ROWS)
        self.budget: Budget | None = None

    def score(
        self, ids: np.ndarray, policy: Policy, kv_bits: float | None = None, result: list[Scored] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first position, logits float32 [rows, vocab]) of block after block; logits are overwritten.

        Args:
            ids: int64 [length].
            policy: chooses every token's precision.
            kv_bits: budget of a scored policy, to be kept at the end of the text.
            result: given the outcome when the text is done.
        """
        shape, block = self.model.architecture, self.recent + 1
        budget = None
        if kv_bits is not None:
            budget = Budget(policy, self.geometry, shape.context, self.recent, kv_bits=kv_bits)
        counts = np.zeros(0 if budget is None else len(budget.pairs), np.int64)
        rarity = RarityCounter(shape.vocab)
        bits = np.empty((self.length, 2), np.uint8)
        keys, values = np.empty((2, *self._kept.shape[1:]), np.float32)
        for start in range(0, self.length, block):
            part = ids[start : start + block]
            stop = start + len(part)
            if len(part) not in self._passes:
                self._passes[len(part)] = SegmentedPass(self.model.engine, len(part), self._attend)
            layers = self._passes[len(part)]
            squares = np.empty((len(part), shape.heads), np.float32) if "attention_variance" in policy.needs else None
            self._before.length = start
            layers.forward(part, self._before, squares)
            logits, entropy, confidence = self._logits(layers.residual, policy)
            positions = np.arange(start, stop)
            variance = None if squares is None else attention_variance(squares, positions + 1)
            features = TokenFeatures(
                positions, entropy, rarity.rarity(part), variance, confidence,
                part, layers.residual, layers.keys, layers.values,
            )  # fmt: skip
            rarity.count(part)
            if budget is not None and isinstance(policy, ScoredPolicy):
                bits[start:stop] = budget.choose(policy.score(features), counts, start, self.length)
            else:
                bits[start:stop] = policy.choose(features)
            keys[:, :, start:stop], values[:, :, start:stop] = layers.keys, layers.values
            self._keep(start, layers.keys, layers.values, bits[start:stop])
            yield start, logits
        if result is not None:
            store = KVStore(self.geometry, self.recent, codecs=self.codecs)
            store.append(keys, values, bits)
            result.append(Scored(bits, store.used_nbytes, store.nbytes))

    def _keep(self, start: int, keys: np.ndarray, values: np.ndarray, bits: np.ndarray) -> None:
        """Round new keys and values [layers, kv_heads, tokens, head_dim] as the window and as their codecs do."""
        span = slice(start, start + len(bits))
        for side, x in enumerate((keys, values)):
            kept = self.codecs.window.roundtrip(x) if self.recent else x
            self._kept[side, :, :, span] = kept
            for width in np.unique(bits[:, side]):
                chosen = np.flatnonzero(bits[:, side] == width)
                self._seen[side, :, :, start + chosen] = np.moveaxis(
                    self.codecs.by_bits[int(width)].roundtrip(np.ascontiguousarray(kept[:, :, chosen])), 2, 0
                )

    def _attend(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, before: KVStore, layer: int, out: np.ndarray,
        squares: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Attention of a block's rows; arguments as in `AttentionBackend.attend`."""
        start = before.length
        count, heads, head_dim = query.shape
        kv_heads, group = key.shape[1], heads // key.shape[1]
        near = max(0, start - self.recent)  # columns before it are decoded for every row
        window = [self.codecs.window.roundtrip(x) if self.recent else x for x in (key, value)]
        # Columns: decoded [0, start), kept [near, start), the block itself.
        kept = [
            np.concatenate([self._kept[side, layer, :, near:start], window[side].transpose(1, 0, 2)], axis=1)
            for side in range(2)
        ]
        seen = [self._seen[side, layer, :, :start] for side in range(2)]
        row = start + np.arange(count)[:, None]
        far_column, near_column = np.arange(start)[None], np.arange(near, start + count)[None]
        far_mask = row - far_column > self.recent
        near_mask = (row - near_column <= self.recent) & (row >= near_column)
        own = (np.arange(count), start - near + np.arange(count))
        rows = query.reshape(count, kv_heads, group, head_dim).transpose(1, 2, 0, 3) * np.float32(head_dim**-0.5)
        total_squares = np.empty((kv_heads, group, count), np.float32)
        for h in range(kv_heads):
            far = rows[h] @ seen[0][h].T  # [group, count, start]
            close = rows[h] @ kept[0][h].T
            close[:, own[0], own[1]] = (rows[h] * key[:, h]).sum(-1)
            scores = np.concatenate([np.where(far_mask, far, -np.inf), np.where(near_mask, close, -np.inf)], axis=-1)
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            total_squares[h] = np.square(scores).sum(-1)
            weights = scores[..., start:]
            mixed = scores[..., :start] @ seen[1][h] + weights @ kept[1][h]
            mixed += weights[:, own[0], own[1]][..., None] * (value[:, h] - window[1][:, h])
            out.reshape(count, kv_heads, group, head_dim)[:, h] = mixed.transpose(1, 0, 2)
        if squares is not None:
            squares[...] = total_squares.reshape(heads, count).T

    def _logits(self, residual: np.ndarray, policy: Policy) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Logits of residual rows, and their entropy and confidence if the policy looks at them."""
        logits = np.empty((len(residual), self.model.architecture.vocab), np.float32)
        entropy, confidence = np.empty((2, len(residual)), np.float32)
        wanted = policy.needs & {"entropy", "confidence"}
        for at in range(0, len(residual), HEAD_ROWS):
            rows = residual[at : at + HEAD_ROWS]
            part = slice(at, at + len(rows))
            logits[part] = self._head.logits(rows)
            if wanted:
                entropy[part], confidence[part] = self._head.uncertainty(len(rows))
        return (logits, entropy, confidence) if wanted else (logits, None, None)
