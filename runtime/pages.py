"""Pages: fixed-capacity arrays of tokens that share one (key bits, value bits) pair.

A page holds all layers and KV heads of its tokens. Tokens are only ever added behind the
last one or dropped from the end, and a stored token's bytes never change. All pages of a bucket but
the last are full, so their number and sizes follow from the bucket's count of tokens alone.

Forked buckets share their pages. A shared page never changes again: whoever wants to add to it or
to drop tokens from it goes on with a copy of its own.

Values lie token by token. Keys lie in tiles of 16 tokens, word by word (see `codecs.base`): word
j of all tokens of a tile, then word j + 1. A dot product with a query then runs down the tokens
of a tile in the lanes of a vector register, without sums across lanes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvq.runtime import hugepages
from kvq.runtime.codecs import CODECS, Codec
from kvq.runtime.codecs.base import WORD_BYTES

# A bucket's pages double from the first size to the last: a handful of tokens does not pay
# for a large page, and a long bucket is a few hundred arrays at most.
TILE_TOKENS = 16
FIRST_PAGE_TOKENS = TILE_TOKENS
LAST_PAGE_TOKENS = 128


class Bits(NamedTuple):
    """Bits per value of a token's keys and values, metadata not counted."""

    k: int
    v: int

    def __str__(self) -> str:
        return f"k{self.k}v{self.v}"


class Geometry(NamedTuple):
    """What fixes the shape of every stored token."""

    layers: int
    kv_heads: int
    head_dim: int


class Encoded(NamedTuple):
    """Packed codes and scales of a run of tokens.

    codes: uint8 [layers, kv_heads, tokens, code_bytes]
    scales: float16 [layers, kv_heads, tokens, 1 or 0]

    Of a single layer, both without the first axis.
    """

    codes: np.ndarray
    scales: np.ndarray

    def tokens(self, index: slice | np.ndarray) -> Encoded:
        """Some tokens: views for a slice, copies for an index array."""
        return Encoded(self.codes[..., index, :], self.scales[..., index, :])


class Slots:
    """Room for the encoded vectors of `capacity` tokens in one of the two layouts.

    Args:
        codec: what the vectors are encoded with.
        geometry: layers, kv_heads, head_dim.
        capacity: tokens, a multiple of TILE_TOKENS.
        tiled: lie in tiles, word by word (keys), instead of token by token (values).

    Attributes:
        codes: uint8 [layers, kv_heads, tiles, words, 16, 4] when tiled, else [layers, kv_heads, capacity, words, 4].
        scales: float16 [layers, kv_heads, capacity, 1 or 0].
        addresses: of the first byte of codes and of scales, for native code.
    """

    def __init__(self, codec: Codec, geometry: Geometry, capacity: int, tiled: bool) -> None:
        words = codec.code_bytes(geometry.head_dim) // WORD_BYTES
        shape = (geometry.layers, geometry.kv_heads)
        layout = (capacity // TILE_TOKENS, words, TILE_TOKENS) if tiled else (capacity, words)
        self.codec = codec
        self.tiled = tiled
        self.codes = hugepages.zeros((*shape, *layout, WORD_BYTES))
        self.scales = hugepages.zeros((*shape, capacity, int(codec.has_scale)), np.float16)
        self.addresses = (self.codes.ctypes.data, self.scales.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.codes.nbytes + self.scales.nbytes

    def write(self, slots: slice | np.ndarray, new: Encoded) -> None:
        """Put the encoded tokens of all layers into slots."""
        self.scales[:, :, slots] = new.scales
        codes = new.codes.reshape(*new.codes.shape[:-1], new.codes.shape[-1] // WORD_BYTES, WORD_BYTES)
        if self.tiled:
            index = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
            by_token = self.codes.transpose(0, 1, 2, 4, 3, 5)
            by_token[:, :, index // TILE_TOKENS, index % TILE_TOKENS] = codes
        else:
            self.codes[:, :, slots] = codes

    def encoded(self, slots: slice | np.ndarray, layer: int | slice = slice(None)) -> Encoded:
        """Some tokens of one layer (or of all), token by token: arrays as in `Encoded`."""
        codes = self.codes[layer]
        if self.tiled:
            by_token = codes.swapaxes(-3, -2)  # [..., tiles, 16, words, 4]
            if isinstance(slots, slice):
                first = slots.start // TILE_TOKENS
                tiles = by_token[..., first : -(-slots.stop // TILE_TOKENS), :, :, :]
                whole = tiles.reshape(*tiles.shape[:-4], tiles.shape[-4] * TILE_TOKENS, *tiles.shape[-2:])
                skip = first * TILE_TOKENS
                codes = whole[..., slots.start - skip : slots.stop - skip, :, :]
            else:
                codes = by_token[..., slots // TILE_TOKENS, slots % TILE_TOKENS, :, :]
        else:
            codes = codes[..., slots, :, :]
        return Encoded(
            codes.reshape(*codes.shape[:-2], codes.shape[-2] * WORD_BYTES), self.scales[layer][..., slots, :]
        )

    def decode(self, slots: slice | np.ndarray, out: np.ndarray, layer: int | slice = slice(None)) -> None:
        """Decode some tokens of one layer (or of all) into out, float32 [(layers,) kv_heads, slots, head_dim]."""
        self.codec.decode(*self.encoded(slots, layer), out)


class Page:
    """Room for `capacity` tokens of one `Bits` pair; `count` of them are used.

    shared: other buckets may hold this page too, so it must not change any more.
    settled: its memory has been put on huge pages, see `settle`.
    """

    def __init__(self, bits: Bits, geometry: Geometry, capacity: int) -> None:
        self.bits = bits
        self.geometry = geometry
        self.capacity = capacity
        self.count = 0
        self.shared = False
        self.settled = False
        self.keys = Slots(CODECS[bits.k], geometry, capacity, tiled=True)
        self.values = Slots(CODECS[bits.v], geometry, capacity, tiled=False)
        self.positions = np.zeros(capacity, np.int32)  # the tag of a token: where it stands in the text
        self.nbytes = self.keys.nbytes + self.values.nbytes + self.positions.nbytes  # of all arrays, free room included

    def append(self, keys: Encoded, values: Encoded, positions: np.ndarray) -> None:
        """Add the tokens behind the last one; the caller has checked that they fit."""
        start, stop = self.count, self.count + len(positions)
        self.keys.write(slice(start, stop), keys)
        self.values.write(slice(start, stop), values)
        self.positions[start:stop] = positions
        self.count = stop

    def parts(self) -> list[np.ndarray]:
        """Views of what is used of each array: positions; key codes of whole tiles, and of the begun one; key scales;
        value codes and scales.
        """
        n, (tiles, rest) = self.count, divmod(self.count, TILE_TOKENS)
        keys, values = self.keys, self.values
        begun = keys.codes[:, :, tiles : tiles + bool(rest), :, :rest]
        return [
            *(self.positions[:n], keys.codes[:, :, :tiles], begun, keys.scales[:, :, :n]),
            *(values.codes[:, :, :n], values.scales[:, :, :n]),
        ]

    def copy(self, count: int) -> Page:
        """A page of the same capacity that holds the first `count` tokens and is nobody else's."""
        twin, kept = Page(self.bits, self.geometry, self.capacity), slice(0, count)
        twin.append(self.keys.encoded(kept), self.values.encoded(kept), self.positions[kept])
        return twin

    def read(self, layer: int, start: int, stop: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Decode one layer's tokens [start, stop) into keys, values float32 [kv_heads, stop - start, head_dim]."""
        for part, out in ((self.keys, keys), (self.values, values)):
            part.decode(slice(start, stop), out, layer)


def settle(pages: list[Page]) -> None:
    """Put the pages' memory on huge pages, once enough of it is new: a step reads all of it."""
    new = sum(page.nbytes for page in pages if not page.settled)
    if new < 2 * hugepages.HUGE_PAGE or new < sum(page.nbytes for page in pages) // 8 or not hugepages.wanted():
        return
    codes = [side.codes for page in pages for side in (page.keys, page.values)]
    hugepages.collapse((array.ctypes.data, array.ctypes.data + array.nbytes) for array in codes)
    for page in pages:
        page.settled = True


class Bucket:
    """All pages of one `Bits` pair, in order of position.

    Attributes:
        count: tokens stored.
        ahead: pages made ahead of the tokens that will need them, see `place`.
        nbytes: bytes of all pages, free room included; kept as pages come and go, since every step asks for it.
    """

    def __init__(self, bits: Bits, geometry: Geometry) -> None:
        self.bits = bits
        self.geometry = geometry
        self.pages: list[Page] = []
        self.ahead: list[Page] = []
        self.count = 0
        self.nbytes = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: codes, scales and its position tag."""
        g = self.geometry
        return g.layers * g.kv_heads * sum(CODECS[b].vector_bytes(g.head_dim) for b in self.bits) + 4

    def open_page(self) -> Page:
        """The last page, which has room for a token and is not shared; a new one if need be."""
        if not self.pages or self.pages[-1].count == self.pages[-1].capacity:
            self.pages.append(self.ahead.pop(0) if self.ahead else self._new_page())
        elif self.pages[-1].shared:
            self.pages[-1] = self.pages[-1].copy(self.pages[-1].count)
        return self.pages[-1]

    def _new_page(self) -> Page:
        """A page for the tokens that come when all others are full."""
        room = sum(page.capacity for page in (*self.pages, *self.ahead))
        page = Page(self.bits, self.geometry, min(max(FIRST_PAGE_TOKENS, room), LAST_PAGE_TOKENS))
        self.nbytes += page.nbytes
        return page

    def place(self, n: int) -> tuple[Page, int]:
        """Page and slot that the n-th of the tokens to come will have, from 0; its page is made if need be."""
        page = self.open_page()
        n += page.count
        for following in self.ahead:
            if n < page.capacity:
                break
            n, page = n - page.capacity, following
        while n >= page.capacity:
            n, page = n - page.capacity, self._new_page()
            self.ahead.append(page)
        return page, n

    def append(self, keys: Encoded, values: Encoded, positions: np.ndarray) -> None:
        """Add tokens, opening pages as needed; existing pages are never copied."""
        done = 0
        while done < len(positions):
            page = self.open_page()
            stop = min(len(positions), done + page.capacity - page.count)
            part = slice(done, stop)
            page.append(keys.tokens(part), values.tokens(part), positions[part])
            self.count += stop - done
            done = stop

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
                continue
            if kept < page.count and page.shared:
                self.pages[-1] = page.copy(kept)
            else:
                page.count = kept
            return

    def fork(self) -> Bucket:
        """A bucket of the same tokens, on the same pages."""
        twin = Bucket(self.bits, self.geometry)
        for page in self.pages:
            page.shared = True
        twin.pages, twin.count = list(self.pages), self.count
        twin.nbytes = self.nbytes - sum(page.nbytes for page in self.ahead)
        return twin
