"""The KV store: every token of a session at its own precision, plus the newest at 16 bits.

Attention does not depend on the order of keys (their rotary phase is already in them), so
tokens live in one bucket per (key bits, value bits) pair and no token is ever moved. The
newest `recent` tokens stay in a ring at 16 bits and are quantized as they leave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.moves import Step
from kvq.runtime.kv.pages import Page
from kvq.runtime.kv.slots import Encoded
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.precision.codecs import NUMPY, CodecSet
from kvq.runtime.precision.table import Bits, Geometry

SINK_BITS = Bits(16, 16)
OPEN = np.zeros((1, 2), np.uint8)  # the bits of a token whose precision is not chosen yet


class KVStore:
    """Keys and values of one session.

    Args:
        geometry: layers, kv_heads, head_dim.
        recent: newest tokens kept at 16 bits, in tokens.
        sink: first tokens of the text stored at 16 bits whatever the policy says, in tokens.
        codecs: what tokens are encoded with.
    """

    def __init__(self, geometry: Geometry, recent: int = 16, sink: int = 0, codecs: CodecSet = NUMPY) -> None:
        self.geometry = geometry
        self.codecs = codecs
        self.sink = sink
        self.window = RecentWindow(geometry, recent)
        self.buckets: dict[Bits, Bucket] = {}
        self.length = 0
        self.peak_nbytes = self.nbytes

    def append(self, keys: np.ndarray, values: np.ndarray, bits: np.ndarray | None) -> None:
        """Add tokens at the positions length, length + 1, ...

        Args:
            keys, values: float32 [layers, kv_heads, tokens, head_dim].
            bits: uint8 [tokens, 2], key and value bits of each token. None leaves that of a single token open:
                `decide` has to come before it leaves the window, and before tokens that come with their bits.

        Raises:
            NonFiniteError: a value cannot be stored; the store is left as it was.
        """
        window = self.window
        still_open = int(bits is None)
        bits = OPEN if bits is None else self._protect(bits, self.length)
        new = len(bits)
        mover = self.codecs.mover
        if mover is not None and mover.takes(window, keys, values):
            mover(window, self._steps(bits), keys, values)
            window.open += still_open
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
            return
        end = self.length + new
        # The window after this call holds the positions [first, end).
        first = max(end - window.capacity, self.length - window.count)
        old_stop = min(first, self.length)
        old = window.slots(self.length - window.count, old_stop)
        skipped = max(0, first - self.length)  # new tokens that pass through the window at once
        leaving = [
            (*window.read(old), window.bits[old]),
            (self._as_in_window(keys[:, :, :skipped]), self._as_in_window(values[:, :, :skipped]), bits[:skipped]),
        ]
        starts = (old_stop - len(old), self.length)
        # Encode everything before changing anything: a refused value must not leave half a token.
        encoded = [part for run, start in zip(leaving, starts, strict=True) for part in self._encode(*run, start)]
        ring = (
            [Encoded(*self.codecs.window.encode(x[:, :, skipped:])) for x in (keys, values)] if window.capacity else []
        )

        for pair, k, v, positions in encoded:
            self._bucket(pair).append(k, v, positions)
        if ring:
            slots = window.slots(self.length + skipped, end)
            window.keys.write(slots, ring[0])
            window.values.write(slots, ring[1])
            window.bits[slots] = bits[skipped:]
            window.count = end - first
        window.open += still_open
        self.length = end
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def _steps(self, bits: np.ndarray) -> list[Step]:
        """Make room for new tokens, uint8 [tokens, 2], and count them: what is to be written where."""
        window, steps = self.window, []
        if len(bits) > 1:  # a page that grows is another one: all steps have to name the last
            self._reserve(np.concatenate([window.bits[self._in_window()], bits]), len(bits))
        for token in bits:
            slot, page, page_slot = self.length % window.capacity, None, 0
            if window.count < window.capacity:
                window.count += 1
            else:
                bucket = self._bucket(Bits(*window.bits[slot].tolist()))
                page = bucket.open_page()
                page_slot = page.count
                page.positions[page_slot] = self.length - window.capacity
                page.count += 1
                bucket.count += 1
            steps.append((slot, page, page_slot))
            window.bits[slot] = token
            self.length += 1
        return steps

    def steps_ahead(self, tokens: int) -> list[Step]:
        """What will happen with the next tokens, at most as many as the window is long, their room made.

        Nothing is stored by it: that is for `append`, which does just this with them. The precisions of the
        tokens that leave the window have to be decided.
        """
        window, steps = self.window, []
        self._reserve(window.bits[self._in_window()], tokens)
        leaving: dict[Bits, int] = {}
        for position in range(self.length, self.length + tokens):
            slot, page, page_slot = position % window.capacity, None, 0
            if position - self.length >= window.capacity - window.count:
                pair = Bits(*window.bits[slot].tolist())
                page, page_slot = self._bucket(pair).place(leaving.get(pair, 0))
                leaving[pair] = leaving.get(pair, 0) + 1
            steps.append((slot, page, page_slot))
        return steps

    def _in_window(self) -> np.ndarray:
        """Slots of the tokens in the recent window, oldest first."""
        return self.window.slots(self.length - self.window.count, self.length)

    def _reserve(self, bits: np.ndarray, tokens: int) -> None:
        """Make room for those of the tokens with these bits, oldest first, that so many new ones drive out."""
        leaving = bits[: max(0, self.window.count + tokens - self.window.capacity)]
        for pair, count in Counter(Bits(*token) for token in leaving.tolist()).items():
            self._bucket(pair).reserve(count)

    def _bucket(self, pair: Bits) -> Bucket:
        """The bucket of a pair, made if need be.

        They are kept sorted: attention sums over them in their order, and a text must not depend on which precision
        came first.
        """
        if pair not in self.buckets:
            self.buckets = dict(sorted([*self.buckets.items(), (pair, Bucket(pair, self.geometry))]))
        return self.buckets[pair]

    def decide(self, bits: np.ndarray) -> None:
        """Set the precision of the open tokens, uint8 [open, 2]."""
        window, start = self.window, self.length - self.window.open
        window.bits[window.slots(start, self.length)] = self._protect(bits, start)
        window.open = 0

    def _protect(self, bits: np.ndarray, start: int) -> np.ndarray:
        """Bits of the tokens from position `start` on, with the sink tokens raised to 16."""
        protected = max(0, self.sink - start)
        if protected:
            bits = bits.copy()
            bits[:protected] = SINK_BITS
        return bits

    def _encode(
        self, keys: np.ndarray, values: np.ndarray, bits: np.ndarray, start: int
    ) -> Iterator[tuple[Bits, Encoded, Encoded, np.ndarray]]:
        """Encode a run of tokens, one vectorized call per pair that occurs in it."""
        if not len(bits):
            return
        code = bits[:, 0].astype(np.int32) << 8 | bits[:, 1]
        for value in np.unique(code):
            pair = Bits(int(value) >> 8, int(value) & 255)
            chosen = np.flatnonzero(code == value)
            parts = [
                Encoded(*self.codecs.by_bits[b].encode(x[:, :, chosen])) for b, x in ((pair.k, keys), (pair.v, values))
            ]
            yield pair, parts[0], parts[1], (start + chosen).astype(np.int32)

    def _as_in_window(self, x: np.ndarray) -> np.ndarray:
        """x as the window would have kept it: stored bytes must not depend on how a text was chunked."""
        return self.codecs.window.roundtrip(x) if self.window.capacity else x

    def trim(self, length: int) -> None:
        """Forget every token at a position >= length.

        Tokens that have left the window stay quantized: the window is only refilled by tokens
        appended later.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim to {length} tokens, the store holds {self.length}")
        for bucket in self.buckets.values():
            bucket.trim(length)
        self.window.count = max(0, length - (self.length - self.window.count))
        self.window.open = max(0, length - (self.length - self.window.open))
        self.length = length

    def fork(self, codecs: CodecSet) -> KVStore:
        """A store of the same tokens that goes its own way and shares the pages; codecs: what it encodes with."""
        twin = KVStore(self.geometry, self.window.capacity, self.sink, codecs)
        twin.window = self.window.copy()
        twin.buckets = {bits: bucket.fork() for bits, bucket in self.buckets.items()}
        twin.length, twin.peak_nbytes = self.length, self.nbytes
        return twin

    def blocks(
        self, layer: int, limit: int, scratch: np.ndarray | None = None, recent: bool = True
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decode one layer, block by block: keys, values float32 [kv_heads, n <= limit, head_dim].

        Together the blocks are all stored tokens, each once, in no particular order. Each block
        is overwritten by the next one: read it before going on.

        Args:
            layer: which one.
            limit: most tokens of a block.
            scratch: float32 [2, at least kv_heads * min(limit, length) * head_dim] to decode into; made if None.
            recent: with the tokens of the recent window.
        """
        g = self.geometry
        if scratch is None:
            scratch = np.empty((2, g.kv_heads * min(limit, self.length) * g.head_dim), np.float32)
        for bucket in self.buckets.values():
            for run in _runs(bucket.pages, limit):
                total = sum(stop - start for _, start, stop in run)
                keys, values = (s[: g.kv_heads * total * g.head_dim].reshape(g.kv_heads, total, -1) for s in scratch)
                at = 0
                for page, start, stop in run:
                    part = slice(at, at + stop - start)
                    page.read(layer, start, stop, keys[:, part], values[:, part])
                    at = part.stop
                yield keys, values
        window = self.window
        start = self.length - (window.count if recent else 0)
        for at in range(start, self.length, limit):
            yield window.read(window.slots(at, min(at + limit, self.length)), layer)

    @property
    def nbytes(self) -> int:
        """Bytes held by all arrays of the store."""
        return self.window.nbytes + sum(bucket.nbytes for bucket in self.buckets.values())

    @property
    def used_nbytes(self) -> int:
        """Bytes of the stored tokens alone: what a step has to read."""
        window = self.window
        return window.count * window.token_bytes + sum(
            bucket.count * bucket.token_bytes for bucket in self.buckets.values()
        )

    def account(self) -> dict[str, dict[str, Any]]:
        """Tokens and bytes by precision: {"k4v4": {"tokens", "nbytes", "slack_nbytes"}, ..., "recent": ...}.

        nbytes are measured from the arrays and include slack, so they add up to `nbytes`.
        """
        rows = {}
        for pair, bucket in sorted(self.buckets.items(), reverse=True):
            used = bucket.count * bucket.token_bytes
            rows[str(pair)] = {"tokens": bucket.count, "nbytes": bucket.nbytes, "slack_nbytes": bucket.nbytes - used}
        window = self.window
        rows["recent"] = {
            "tokens": window.count,
            "nbytes": window.nbytes,
            "slack_nbytes": window.nbytes - window.count * window.token_bytes,
        }
        return rows


def distinct_nbytes(stores: Collection[KVStore]) -> int:
    """Bytes held by all arrays of some stores, shared pages counted once."""
    held = {id(store.window): store.window.nbytes for store in stores}
    buckets = [bucket for store in stores for bucket in store.buckets.values()]
    held |= {id(page): page.nbytes for bucket in buckets for page in (*bucket.pages, *bucket.ahead)}
    return sum(held.values())


def _runs(pages: list[Page], limit: int) -> Iterator[list[tuple[Page, int, int]]]:
    """Cut the tokens of consecutive pages into runs of `limit`, the last one shorter: (page, start, stop) each."""
    run: list[tuple[Page, int, int]] = []
    room = limit
    for page in pages:
        start = 0
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
