"""The way of new tokens through the recent window: what each drives out of it, and where that goes.

This is the one plan of it. Native code carries it out while it stores tokens (`Mover`) and while a stepwise pass is
running; what numpy does instead, `KVStore.append` and the numpy backend, is written apart from it on purpose: the two
have to give the same bytes, and tests hold them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.pages import Page
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.precision.codecs import CodecSet
from kvq.runtime.precision.table import Pair


class Move(NamedTuple):
    """What happens with one new token.

    Attributes:
        slot: of the window, which it takes.
        page, page_slot: where the token goes that stood there; None and 0 where the slot was free.
    """

    slot: int
    page: Page | None
    page_slot: int


class Mover(Protocol):
    """Takes new tokens through the window in one call; the bytes are those that encoding and writing in numpy gives."""

    def takes(
        self, window: RecentWindow, gone: list[Pair], keys: np.ndarray, values: np.ndarray, codecs: CodecSet
    ) -> bool:
        """Whether it can: arrays as it needs them, nothing in them that a codec would refuse, and only precisions that
        it encodes itself in `gone`, see `leaving`.
        """

    def __call__(
        self,
        window: RecentWindow,
        moves: list[Move],
        keys: np.ndarray,
        values: np.ndarray,
        codecs: CodecSet,
    ) -> None:
        """Carry out one move after the other; keys, values float32 [layers, kv_heads, tokens, head_dim]; of codecs it
        takes feedback and turns. Counts and tags are the store's.
        """


def leaving(window: RecentWindow, length: int, tokens: int, chosen: np.ndarray | None) -> list[Pair]:
    """Precisions of what so many new tokens drive out of the window, oldest first.

    Args:
        length: tokens before them.
        chosen: uint8 [tokens, 2], of the new ones, which may leave at once; None: no more come than the window holds.
    """
    count = max(0, window.count + tokens - window.capacity)
    old, first = min(count, window.count), length - window.count
    pairs = [Pair(*window.chosen[(first + i) % window.capacity].tolist()) for i in range(old)]
    if count > old and chosen is not None:
        pairs += [Pair(*token) for token in chosen[: count - old].tolist()]
    return pairs


def plan(
    window: RecentWindow, length: int, tokens: int, gone: list[Pair], bucket_of: Callable[[Pair], Bucket]
) -> list[Move]:
    """The moves of new tokens, the room for them made; nothing else changes.

    Args:
        window: as it is before them.
        length: tokens before them.
        tokens: how many come.
        gone: what they drive out, see `leaving`.
        bucket_of: the bucket of a pair.
    """
    counts = Counter(gone)
    for pair, count in counts.items():  # a page that grows is another one: first all room, then the places
        bucket_of(pair).reserve(count)
    places = {pair: bucket_of(pair).places() for pair in counts}
    stays, capacity = tokens - len(gone), window.capacity
    moves = [Move((length + i) % capacity, None, 0) for i in range(stays)]
    for at, pair in enumerate(gone, length + stays):
        page, page_slot = next(places[pair])
        page.positions[page_slot] = at - capacity  # a stepwise pass looks at it before it is counted
        moves.append(Move(at % capacity, page, page_slot))
    return moves
