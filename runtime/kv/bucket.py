"""Buckets: all pages of one pair of precisions, and how they grow, shrink and are shared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvq.runtime.kv.pages import PAGE_TOKENS, Page
from kvq.runtime.kv.sides import last_capacity
from kvq.runtime.kv.slots import Encoded
from kvq.runtime.precision.table import Geometry, Pair


class Bucket:
    """All pages of one `Pair`, in order of position.

    Attributes:
        count: tokens stored.
        token_bytes: bytes of one token: codes, scales and its position tag.
        narrow: pages at the beginning that hold the layers without a window alone.
        ahead: pages made ahead of the tokens that will need them, see `reserve`.
        nbytes: bytes of all pages, free room included; kept as pages come and go, since every step asks for it.
    """

    def __init__(self, pair: Pair, geometry: Geometry) -> None:
        self.pair = pair
        self.geometry = geometry
        self.pages: list[Page] = []
        self.ahead: list[Page] = []
        self.count = self.narrow = 0
        self.nbytes = 0
        self.token_bytes = geometry.token_bytes(pair)

    def reserve(self, tokens: int) -> None:
        """Make room for so many further tokens, in pages nobody else has: the last one grows, then come others."""
        last = self.pages[-1] if self.pages else None
        if last and last.shared and last.count < last.capacity:
            self.pages[-1] = last = last.copy(last.count, last.capacity)
        free = last.capacity - last.count if last else 0
        missing = tokens - free - sum(page.capacity for page in self.ahead)
        at_end = self.ahead or self.pages
        if missing > 0 and at_end and at_end[-1].capacity < PAGE_TOKENS:
            small = at_end[-1]
            at_end[-1] = small.copy(small.count, self._last_capacity(small.capacity + missing))
            self.nbytes += at_end[-1].nbytes - small.nbytes
            missing -= at_end[-1].capacity - small.capacity
        while missing > 0:
            self.ahead.append(Page(self.pair, self.geometry, self._last_capacity(missing)))
            self.nbytes += self.ahead[-1].nbytes
            missing -= self.ahead[-1].capacity

    def _last_capacity(self, tokens: int) -> int:
        return last_capacity(min(tokens, PAGE_TOKENS), self.geometry.layers)

    def open_page(self) -> Page:
        """The page with room for the next token, which is not shared; made or grown if need be."""
        if not self.pages or self.pages[-1].shared or self.pages[-1].count == self.pages[-1].capacity:
            self.reserve(1)
            if not self.pages or self.pages[-1].count == self.pages[-1].capacity:
                self.pages.append(self.ahead.pop(0))
        return self.pages[-1]

    def places(self) -> Iterator[tuple[Page, int]]:
        """Page and slot that each of the tokens to come will have, as far as there is room: see `reserve`."""
        for page in (*self.pages[-1:], *self.ahead):
            for slot in range(page.count, page.capacity):
                yield page, slot

    def count_in(self, position: int) -> None:
        """Count the next token, whose vectors somebody else writes where `places` said."""
        page = self.open_page()
        page.positions[page.count] = position
        page.count += 1
        self.count += 1

    def append(self, keys: list[Encoded], values: list[Encoded], positions: np.ndarray) -> None:
        """Add tokens, as `kvq.runtime.kv.sides.Side.write` takes them, with pages for them as needed."""
        self.reserve(len(positions))
        done = 0
        while done < len(positions):
            page = self.open_page()
            stop = min(len(positions), done + page.capacity - page.count)
            part = slice(done, stop)
            page.append([x.tokens(part) for x in keys], [x.tokens(part) for x in values], positions[part])
            self.count += stop - done
            done = stop

    def forget(self, position: int) -> None:
        """Free what the layers with windows have of whole pages before a position."""
        pages = self.pages
        while self.narrow < len(pages):
            page = pages[self.narrow]
            if page.count < PAGE_TOKENS or page.positions[-1] >= position:
                return
            self.narrow_pages(1)

    def narrow_pages(self, pages: int) -> None:
        """Free what the layers with windows have of the next full pages."""
        for at in range(self.narrow, self.narrow + pages):
            page = self.pages[at]
            self.pages[at] = page.narrowed()
            self.nbytes += self.pages[at].nbytes - page.nbytes
        self.narrow += pages

    @property
    def forgotten(self) -> int:
        """Where the layers with windows begin to have tokens: no earlier than this position."""
        return int(self.pages[self.narrow - 1].positions[-1]) + 1 if self.narrow else 0

    @property
    def used_nbytes(self) -> int:
        """Bytes of its tokens alone."""
        freed = self.token_bytes - self.geometry.narrow.token_bytes(self.pair) if self.narrow else 0
        return self.count * self.token_bytes - self.narrow * PAGE_TOKENS * freed

    @property
    def values(self) -> int:
        """Numbers that it holds."""
        freed = self.geometry.values - self.geometry.narrow.values
        return self.count * self.geometry.values - self.narrow * PAGE_TOKENS * freed

    def trim(self, length: int) -> None:
        """Drop every token at a position >= length."""
        self.nbytes -= sum(page.nbytes for page in self.ahead)
        self.ahead = []
        while self.pages:
            page = self.pages[-1]
            kept = int(np.searchsorted(page.positions[: page.count], length))
            self.count -= page.count - kept
            if not kept:
                self.nbytes -= self.pages.pop().nbytes
                self.narrow = min(self.narrow, len(self.pages))
                continue
            capacity = self._last_capacity(kept)
            if capacity < page.capacity or (kept < page.count and page.shared):
                self.pages[-1] = page.copy(kept, capacity)
                self.nbytes += self.pages[-1].nbytes - page.nbytes
            else:
                page.count = kept
            return

    def fork(self) -> Bucket:
        """A bucket of the same tokens, on the same pages."""
        twin = Bucket(self.pair, self.geometry)
        for page in self.pages:
            page.shared = True
        twin.pages, twin.count, twin.narrow = list(self.pages), self.count, self.narrow
        twin.nbytes = self.nbytes - sum(page.nbytes for page in self.ahead)
        return twin

    @property
    def growing(self) -> Page | None:
        """The page that more tokens go to or that grows for them; None where there is none, or the last one is full."""
        last = self.pages[-1] if self.pages else None
        return None if last is None or last.count == PAGE_TOKENS else last
