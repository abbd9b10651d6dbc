"""The KV store: every token of a session at its own precision, the newest and the first at 8 or 16 bits.

Attention does not depend on the order of keys (their rotary phase is already in them), so
tokens live in one bucket per pair of precisions and no token is ever moved. The
newest `recent` tokens stay in a ring and take that precision as they leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.moves import Move, leaving, plan
from kvq.runtime.kv.pages import PAGE_TOKENS, Page
from kvq.runtime.kv.sides import parts_of
from kvq.runtime.kv.slots import Encoded
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.precision.codecs import NUMPY, Codec, CodecSet
from kvq.runtime.precision.precision import OPEN
from kvq.runtime.precision.table import PROTECTED, Geometry, Pair

# Tokens that layers with a window keep beyond it, so that a text can be trimmed by so many without them.
LAG = PAGE_TOKENS


class KVStore:
    """Keys and values of one session.

    Args:
        geometry: layers, kv_heads, head_dim.
        recent: newest tokens, which the window keeps, in tokens.
        sink: first tokens of the text, protected whatever the policy says, in tokens.
        codecs: what tokens are encoded with.
        protect_bits: 8 or 16, of the newest and the first tokens.

    Attributes:
        buckets: the pages of each pair, sorted by pair.
        length: tokens held, those of the window included.
        choose_open: asked for the pairs of tokens that were appended without: the store, position of the
            first, how many -> uint8 [tokens, 2].
    """

    def __init__(
        self, geometry: Geometry, recent: int = 16, sink: int = 0, codecs: CodecSet = NUMPY, protect_bits: int = 16
    ) -> None:
        self.geometry = geometry
        self.codecs = codecs
        self.sink = sink
        self.window = RecentWindow(geometry, recent, protect_bits)
        self.buckets: dict[Pair, Bucket] = {}
        self.choose_open: Callable[[KVStore, int, int], np.ndarray] | None = None
        self.length = 0
        self.peak_nbytes = self.nbytes

    def append(self, keys: np.ndarray, values: np.ndarray, chosen: np.ndarray | None) -> None:
        """Add tokens at the positions length, length + 1, ...

        Args:
            keys, values: float32 [layers, kv_heads, tokens, head_dim].
            chosen: uint8 [tokens, 2], the `Pair` of each token. None leaves that of a single token open: `choose_open`
                is asked for it before it leaves the window, or whenever else it is needed.

        Raises:
            NonFiniteError: a value cannot be stored; the store is left as it was.
        """
        window, still_open, mover = self.window, int(chosen is None), self.codecs.mover
        if not still_open or window.open >= window.capacity:
            self.settle()
        chosen = np.full((1, 2), OPEN, np.uint8) if chosen is None else self._protect(chosen, self.length)
        gone = leaving(window, self.length, len(chosen), chosen) if mover is not None else []
        if mover is not None and mover.takes(window, gone, keys, values, self.codecs):
            moves = plan(window, self.length, len(chosen), gone, self._bucket)
            mover(window, moves, keys, values, self.codecs)
            self._count_in(moves, chosen)
        else:
            self._append(keys, values, chosen)
        window.open += still_open
        if self.geometry.window:
            for bucket in self.buckets.values():
                bucket.forget(self.length - self.geometry.window + 1 - LAG)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def _append(self, keys: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> None:
        """Add tokens by encoding in numpy; what a mover does has to give the same bytes."""
        window, new = self.window, len(chosen)
        end = self.length + new
        # The window after this call holds the positions [first, end).
        first = max(end - window.capacity, self.length - window.count)
        old_stop = min(first, self.length)
        old = window.slots(self.length - window.count, old_stop)
        skipped = max(0, first - self.length)  # new tokens that pass through the window at once
        leaving = [
            (*window.read(old), window.chosen[old]),
            (self._as_in_window(keys[:, :, :skipped]), self._as_in_window(values[:, :, :skipped]), chosen[:skipped]),
        ]
        starts = (old_stop - len(old), self.length)
        # Encode everything before changing anything: a refused value must not leave half a token.
        encoded = [part for run, start in zip(leaving, starts, strict=True) for part in self._encode(*run, start)]
        ring = [Encoded(*self._as_window.encode(x[:, :, skipped:])) for x in (keys, values)] if window.capacity else []

        for pair, k, v, positions in encoded:
            self._bucket(pair).append(k, v, positions)
        if ring:
            slots = window.slots(self.length + skipped, end)
            window.keys.write(slots, ring[0])
            window.values.write(slots, ring[1])
            window.chosen[slots] = chosen[skipped:]
            window.count = end - first
        self.length = end

    def moves_ahead(self, tokens: int) -> list[Move]:
        """What will happen with the next tokens, at most as many as the window is long, their room made.

        Nothing is stored by it: that is for `append`, which does just this with them.
        """
        self.settle()
        gone = leaving(self.window, self.length, tokens, None)
        return plan(self.window, self.length, tokens, gone, self._bucket)

    def release(self, pairs: Collection[Pair]) -> None:
        """Give back the room that `moves_ahead` has made, for tokens that may not come.

        pairs: of the buckets that there were before.
        """
        for pair, bucket in list(self.buckets.items()):
            bucket.trim(self.length)
            if not bucket.count and pair not in pairs:
                del self.buckets[pair]

    def _count_in(self, moves: list[Move], chosen: np.ndarray) -> None:
        """Count new tokens, uint8 [tokens, 2], that have been moved."""
        window = self.window
        for move, token in zip(moves, chosen, strict=True):
            if move.page is None:
                window.count += 1
            else:
                self.buckets[move.page.pair].count_in(self.length - window.capacity)
            window.chosen[move.slot] = token
            self.length += 1

    def _bucket(self, pair: Pair) -> Bucket:
        """The bucket of a pair, made if need be.

        They are kept sorted: attention sums over them in their order, and a text must not depend on which precision
        came first.
        """
        if pair not in self.buckets:
            self.buckets = dict(sorted([*self.buckets.items(), (pair, Bucket(pair, self.geometry))]))
        return self.buckets[pair]

    def settle(self) -> None:
        """Have the pairs of open tokens chosen now, if there are any."""
        window = self.window
        if not window.open:
            return
        if self.choose_open is None:
            raise RuntimeError("a token was left open in a store whose choose_open nobody has set")
        start = self.length - window.open
        chosen = self.choose_open(self, start, window.open)
        window.chosen[window.slots(start, self.length)] = self._protect(chosen, start)
        window.open = 0

    def due(self) -> np.ndarray:
        """Pairs that the tokens of the recent window will be stored at, oldest first: uint8 [tokens, 2], a copy."""
        self.settle()
        window = self.window
        return window.chosen[window.slots(self.length - window.count, self.length)]

    def _protect(self, chosen: np.ndarray, start: int) -> np.ndarray:
        """Pairs of the tokens from position `start` on, with those of the sink tokens as `protect_bits` says."""
        protected = max(0, self.sink - start)
        if protected:
            chosen = chosen.copy()
            chosen[:protected] = PROTECTED[self.protect_bits]
        return chosen

    def _encode(
        self, keys: np.ndarray, values: np.ndarray, chosen: np.ndarray, start: int
    ) -> Iterator[tuple[Pair, list[Encoded], list[Encoded], np.ndarray]]:
        """Encode a run of tokens, one vectorized call per pair that occurs in it, or per part of its layers."""
        if not len(chosen):
            return
        code = chosen[:, 0].astype(np.int32) << 8 | chosen[:, 1]
        for value in np.unique(code):
            pair = Pair(int(value) >> 8, int(value) & 255)
            tokens = np.flatnonzero(code == value)
            places = (start + tokens).astype(np.int32)
            k, v = (
                [
                    Encoded(*self.codecs.stored(id_, x[layers][:, :, tokens], of_keys, places, layers))
                    for id_, layers in parts
                ]
                for parts, x, of_keys in zip(parts_of(pair, self.geometry), (keys, values), (True, False), strict=True)
            )
            yield pair, k, v, places

    def _as_in_window(self, x: np.ndarray) -> np.ndarray:
        """x as the window would have kept it: stored bytes must not depend on how a text was chunked."""
        return self._as_window.roundtrip(x) if self.window.capacity else x

    def trim(self, length: int) -> None:
        """Forget every token at a position >= length.

        Tokens that have left the window stay quantized: the window is only refilled by tokens
        appended later.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim to {length} tokens, the store holds {self.length}")
        if 0 < length < self.least_trim:
            raise ValueError(f"cannot trim to {length} tokens: layers with a window have lost what the next token sees")
        self.settle()
        for bucket in self.buckets.values():
            bucket.trim(length)
        self.window.count = max(0, length - (self.length - self.window.count))
        self.length = length

    def fork(self, codecs: CodecSet) -> KVStore:
        """A store of the same tokens that goes its own way and shares the pages; codecs: what it encodes with."""
        self.settle()
        twin = KVStore(self.geometry, self.window.capacity, self.sink, codecs, self.protect_bits)
        twin.window = self.window.copy()
        twin.buckets = {pair: bucket.fork() for pair, bucket in self.buckets.items()}
        twin.length, twin.peak_nbytes = self.length, self.nbytes
        return twin

    def blocks(
        self, layer: int, limit: int, scratch: np.ndarray | None = None, recent: bool = True
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decode one layer, block by block: keys, values float32 [kv_heads, n <= limit, head_dim].

        Together the blocks are all stored tokens that the next one sees, each once, in no particular order. Each
        block is overwritten by the next one: read it before going on.

        Args:
            layer: which one.
            limit: most tokens of a block.
            scratch: float32 [2, at least kv_heads * min(limit, length) * head_dim] to decode into; made if None.
            recent: with the tokens of the recent window.
        """
        for keys, values, _ in self.placed_blocks(layer, limit, scratch, recent):
            yield keys, values

    def placed_blocks(
        self, layer: int, limit: int, scratch: np.ndarray | None = None, recent: bool = True
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`blocks`, and where their tokens stand in the text: int64 [n]."""
        g = self.geometry
        sees = g.windows[layer] if g.windows else 0
        first = max(0, self.length - sees + 1) if sees else 0
        if scratch is None:
            scratch = np.empty((2, g.kv_heads * min(limit, self.length) * g.head_dim), np.float32)
        for bucket in self.buckets.values():
            for run in _runs(bucket.pages, limit, first):
                total = sum(stop - start for _, start, stop in run)
                keys, values = (s[: g.kv_heads * total * g.head_dim].reshape(g.kv_heads, total, -1) for s in scratch)
                at = 0
                for page, start, stop in run:
                    part = slice(at, at + stop - start)
                    page.read(layer, start, stop, keys[:, part], values[:, part])
                    at = part.stop
                places = np.concatenate([page.positions[start:stop] for page, start, stop in run]).astype(np.int64)
                if (turns := self.codecs.turns_of(g.by_layer(bucket.pair)[layer].k)) is not None:
                    keys += turns.seen(places, layer)
                yield keys, values, places
        window = self.window
        start = max(first, self.length - (window.count if recent else 0))
        for at in range(start, self.length, limit):
            places = np.arange(at, min(at + limit, self.length))
            yield *window.read(places % window.capacity, layer), places

    @property
    def forgotten(self) -> int:
        """Where the layers with windows begin to have all tokens; 0: they have all."""
        return max((bucket.forgotten for bucket in self.buckets.values()), default=0)

    @property
    def least_trim(self) -> int:
        """Fewest tokens but none that it can be trimmed to: the next one has to find all that its windows show."""
        forgotten = self.forgotten
        return forgotten + self.geometry.window - 1 if forgotten else 0

    @property
    def values(self) -> int:
        """Numbers that it holds: what bits per value are counted by."""
        buckets = sum(bucket.values for bucket in self.buckets.values())
        return buckets + self.window.count * self.geometry.values

    @property
    def nbytes(self) -> int:
        """Bytes held by all arrays of the store."""
        return self.window.nbytes + sum(bucket.nbytes for bucket in self.buckets.values())

    @property
    def used_nbytes(self) -> int:
        """Bytes of the stored tokens alone: what a step has to read."""
        window = self.window
        return window.count * window.token_bytes + sum(bucket.used_nbytes for bucket in self.buckets.values())

    def account(self) -> dict[str, dict[str, Any]]:
        """Tokens and bytes by precision: {"k4v4": {"tokens", "nbytes", "slack_nbytes"}, ..., "recent": ...}.

        nbytes are measured from the arrays and include slack, so they add up to `nbytes`.
        """
        rows = {}
        for pair, bucket in sorted(self.buckets.items(), reverse=True):
            used = bucket.used_nbytes
            rows[str(pair)] = {"tokens": bucket.count, "nbytes": bucket.nbytes, "slack_nbytes": bucket.nbytes - used}
        window = self.window
        rows["recent"] = {
            "tokens": window.count,
            "nbytes": window.nbytes,
            "slack_nbytes": window.nbytes - window.count * window.token_bytes,
        }
        return rows

    @property
    def recent(self) -> int:
        """Newest tokens that are protected: the length of the window, in tokens."""
        return self.window.capacity

    @property
    def protect_bits(self) -> int:
        """Bits at which the newest and the first tokens are kept."""
        return self.window.bits

    @property
    def _as_window(self) -> Codec:
        """Encodes what the window takes."""
        return self.codecs.windows[self.window.bits]

    @property
    def bucketed(self) -> int:
        """Tokens that have left the recent window, in tokens."""
        return self.length - self.window.count

    @property
    def pairs(self) -> list[Pair]:
        """Pairs that it has buckets of, in order."""
        return list(self.buckets)

    @property
    def empty_nbytes(self) -> int:
        """Bytes of such a store without tokens: those of its window."""
        return self.window.nbytes

    @property
    def fork_nbytes(self) -> int:
        """Most bytes that a fork comes to have of its own before it grows."""
        return self.window.nbytes + self.growing_nbytes()

    def growing_nbytes(self, shared: bool = False) -> int:
        """Bytes of the pages that more tokens go to or that grow for them.

        Args:
            shared: of those alone that forks share: an append copies them.
        """
        pages = [page for bucket in self.buckets.values() if (page := bucket.growing) is not None]
        return sum(page.nbytes for page in pages if page.shared or not shared)


def distinct_nbytes(stores: Collection[KVStore]) -> int:
    """Bytes held by all arrays of some stores, shared pages counted once."""
    held = {id(store.window): store.window.nbytes for store in stores}
    buckets = [bucket for store in stores for bucket in store.buckets.values()]
    held |= {id(page): page.nbytes for bucket in buckets for page in (*bucket.pages, *bucket.ahead)}
    return sum(held.values())


def _runs(pages: list[Page], limit: int, first: int = 0) -> Iterator[list[tuple[Page, int, int]]]:
    """Cut the tokens of consecutive pages into runs of `limit`, the last one shorter: (page, start, stop) each.

    first: position of the first token that is wanted.
    """
    run: list[tuple[Page, int, int]] = []
    room = limit
    for page in pages:
        start = int(np.searchsorted(page.positions[: page.count], first)) if first else 0
        while start < page.count:
            stop = min(page.count, start + room)
            run.append((page, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield run
                run, room = [], limit
    if run:
        yield run
