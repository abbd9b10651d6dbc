"""Pages: fixed-capacity arrays of tokens that share one (key bits, value bits) pair.

A page holds all layers and KV heads of its tokens. Tokens are only ever added behind the
last one or dropped from the end, and a stored token's bytes never change. All pages of a bucket but
the last are full and of one size; the last one doubles until it has that size, too. So number and
sizes of pages follow from the bucket's count of tokens alone.

Forked buckets share their pages. A shared page never changes again: whoever wants to add to it or
to drop tokens from it goes on with a copy of its own.

Values lie token by token. Keys lie in tiles of 16 tokens, word by word (see `codecs.base`): word
j of all tokens of a tile, then word j + 1. A dot product with a query then runs down the tokens
of a tile in the lanes of a vector register, without sums across lanes.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from kvq.runtime.machine import hugepages
from kvq.runtime.precision.codecs import CODECS, Codec
from kvq.runtime.precision.codecs.base import WORD_BYTES

TILE_TOKENS = 16
PAGE_TOKENS = 128  # of a full page: a long bucket is a few hundred arrays at most


def last_capacity(tokens: int) -> int:
    """Tokens that a last page has room for when it has to hold so many, 1 to PAGE_TOKENS.

    A handful of tokens does not pay for a large page, and less than half of a page beyond the first tile is free.
    """
    return max(TILE_TOKENS, 1 << (tokens - 1).bit_length())


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
        lasting: will be there for long, so they may lie among what huge pages are made of.

    Attributes:
        codes: uint8 [layers, kv_heads, tiles, words, 16, 4] when tiled, else [layers, kv_heads, capacity, words, 4].
        scales: float16 [layers, kv_heads, capacity, 1 or 0].
        addresses: of the first byte of codes and of scales, for native code.
    """

    def __init__(self, codec: Codec, geometry: Geometry, capacity: int, tiled: bool, lasting: bool = True) -> None:
        words = codec.code_bytes(geometry.head_dim) // WORD_BYTES
        shape = (geometry.layers, geometry.kv_heads)
        layout = (capacity // TILE_TOKENS, words, TILE_TOKENS) if tiled else (capacity, words)
        self.codec = codec
        self.tiled = tiled
        zeros = hugepages.zeros if lasting else np.zeros
        self.codes = zeros((*shape, *layout, WORD_BYTES), np.uint8)
        self.scales = zeros((*shape, capacity, int(codec.has_scale)), np.float16)
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
    row: where its arrays are, for native code, which fills it in.
    settled: its memory has been put on huge pages, or is not worth it, see `settle`.
    """

    def __init__(self, bits: Bits, geometry: Geometry, capacity: int) -> None:
        self.bits = bits
        self.geometry = geometry
        self.capacity = capacity
        self.count = 0
        self.shared = False
        self.row: ctypes.Array[ctypes.c_char] | None = None
        self.settled = capacity < PAGE_TOKENS  # a smaller one will be replaced soon
        self.keys = Slots(CODECS[bits.k], geometry, capacity, tiled=True, lasting=not self.settled)
        self.values = Slots(CODECS[bits.v], geometry, capacity, tiled=False, lasting=not self.settled)
        self.positions = np.zeros(capacity, np.int32)  # the tag of a token: where it stands in the text
        self.nbytes = self.keys.nbytes + self.values.nbytes + self.positions.nbytes  # of all arrays, free room included

    def append(self, keys: Encoded, values: Encoded, positions: np.ndarray) -> None:
        """Add the tokens behind the last one; the caller has checked that they fit."""
        start, stop = self.count, self.count + len(positions)
        self.keys.write(slice(start, stop), keys)
        self.values.write(slice(start, stop), values)
        self.positions[start:stop] = positions
        self.count = stop

    def parts(self, start: int = 0, stop: int | None = None) -> list[np.ndarray]:
        """Views of what is used of each array, or of the tokens from `start`, the first one of a tile, up to `stop`:
        positions; key codes of whole tiles, and of the begun one; key scales; value codes and scales.
        """
        stop = self.count if stop is None else stop
        first, (tiles, rest) = start // TILE_TOKENS, divmod(stop, TILE_TOKENS)
        keys, values, used = self.keys, self.values, slice(start, stop)
        begun = keys.codes[:, :, tiles : tiles + bool(rest), :, :rest]
        return [
            *(self.positions[used], keys.codes[:, :, first:tiles], begun, keys.scales[:, :, used]),
            *(values.codes[:, :, used], values.scales[:, :, used]),
        ]

    def copy(self, count: int, capacity: int) -> Page:
        """A page of that capacity that holds the first `count` tokens and is nobody else's."""
        twin = Page(self.bits, self.geometry, capacity)
        twin.count = count
        for new, old in zip(twin.parts(), self.parts(0, count), strict=True):
            new[...] = old
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
        token_bytes: bytes of one token: codes, scales and its position tag.
        ahead: pages made ahead of the tokens that will need them, see `reserve`.
        nbytes: bytes of all pages, free room included; kept as pages come and go, since every step asks for it.
    """

    def __init__(self, bits: Bits, geometry: Geometry) -> None:
        self.bits = bits
        self.geometry = geometry
        self.pages: list[Page] = []
        self.ahead: list[Page] = []
        self.count = 0
        self.nbytes = 0
        vector_bytes = sum(CODECS[width].vector_bytes(geometry.head_dim) for width in bits)
        self.token_bytes = geometry.layers * geometry.kv_heads * vector_bytes + 4

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
            at_end[-1] = small.copy(small.count, last_capacity(min(small.capacity + missing, PAGE_TOKENS)))
            self.nbytes += at_end[-1].nbytes - small.nbytes
            missing -= at_end[-1].capacity - small.capacity
        while missing > 0:
            self.ahead.append(Page(self.bits, self.geometry, last_capacity(min(missing, PAGE_TOKENS))))
            self.nbytes += self.ahead[-1].nbytes
            missing -= self.ahead[-1].capacity

    def open_page(self) -> Page:
        """The page with room for the next token, which is not shared; made or grown if need be."""
        if not self.pages or self.pages[-1].shared or self.pages[-1].count == self.pages[-1].capacity:
            self.reserve(1)
            if not self.pages or self.pages[-1].count == self.pages[-1].capacity:
                self.pages.append(self.ahead.pop(0))
        return self.pages[-1]

    def place(self, n: int) -> tuple[Page, int]:
        """Page and slot that the n-th of the tokens to come will have, from 0; there has to be room for it."""
        pages = [*self.pages[-1:], *self.ahead]
        n += self.pages[-1].count if self.pages else 0
        for page in pages:
            if n < page.capacity:
                return page, n
            n -= page.capacity
        raise IndexError(f"{self.bits} has no room for so many tokens; reserve it")

    def append(self, keys: Encoded, values: Encoded, positions: np.ndarray) -> None:
        """Add tokens, with pages for them as needed."""
        self.reserve(len(positions))
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
            capacity = last_capacity(kept)
            if capacity < page.capacity or (kept < page.count and page.shared):
                self.pages[-1] = page.copy(kept, capacity)
                self.nbytes += self.pages[-1].nbytes - page.nbytes
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
