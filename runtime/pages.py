"""Pages: fixed-capacity arrays of tokens that share one (key bits, value bits) pair.

A page holds all layers and KV heads of its tokens. Tokens are only ever added behind the
last one or dropped from the end, and a stored token's bytes never change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvq.runtime.codecs import CODECS, Codec

# A bucket's pages double from the first size to the last: a handful of tokens does not pay
# for a large page, and a long bucket is a few hundred arrays at most.
FIRST_PAGE_TOKENS = 16
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

    @staticmethod
    def room(codec: Codec, geometry: Geometry, tokens: int) -> Encoded:
        """Empty arrays for that many tokens."""
        shape = (geometry.layers, geometry.kv_heads, tokens)
        return Encoded(
            np.zeros((*shape, codec.code_bytes(geometry.head_dim)), np.uint8),
            np.zeros((*shape, int(codec.has_scale)), np.float16),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.codes.nbytes + self.scales.nbytes

    def layer(self, layer: int) -> Encoded:
        """One layer, as views."""
        return Encoded(self.codes[layer], self.scales[layer])

    def tokens(self, index: slice | np.ndarray) -> Encoded:
        """Some tokens: views for a slice, copies for an index array."""
        return Encoded(self.codes[..., index, :], self.scales[..., index, :])


class Page:
    """Room for `capacity` tokens of one `Bits` pair; `count` of them are used."""

    def __init__(self, bits: Bits, geometry: Geometry, capacity: int) -> None:
        self.bits = bits
        self.capacity = capacity
        self.count = 0
        self.keys = Encoded.room(CODECS[bits.k], geometry, capacity)
        self.values = Encoded.room(CODECS[bits.v], geometry, capacity)
        self.positions = np.zeros(capacity, np.int32)  # the tag of a token: where it stands in the text

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, free room included."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes

    def append(self, keys: Encoded, values: Encoded, positions: np.ndarray) -> None:
        """Add the tokens behind the last one; the caller has checked that they fit."""
        start, stop = self.count, self.count + len(positions)
        for room, new in ((self.keys, keys), (self.values, values)):
            room.codes[:, :, start:stop] = new.codes
            room.scales[:, :, start:stop] = new.scales
        self.positions[start:stop] = positions
        self.count = stop

    def read(self, layer: int, start: int, stop: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Decode one layer's tokens [start, stop) into keys, values float32 [kv_heads, stop - start, head_dim]."""
        for bits, part, out in ((self.bits.k, self.keys, keys), (self.bits.v, self.values, values)):
            CODECS[bits].decode(*part.layer(layer).tokens(slice(start, stop)), out)


class Bucket:
    """All pages of one `Bits` pair, in order of position."""

    def __init__(self, bits: Bits, geometry: Geometry) -> None:
        self.bits = bits
        self.geometry = geometry
        self.pages: list[Page] = []

    @property
    def count(self) -> int:
        """Tokens stored."""
        return sum(page.count for page in self.pages)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, free room included."""
        return sum(page.nbytes for page in self.pages)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: codes, scales and its position tag."""
        g = self.geometry
        return g.layers * g.kv_heads * sum(CODECS[b].vector_bytes(g.head_dim) for b in self.bits) + 4

    def append(self, keys: Encoded, values: Encoded, positions: np.ndarray) -> None:
        """Add tokens, opening pages as needed; existing pages are never copied."""
        done = 0
        while done < len(positions):
            if not self.pages or self.pages[-1].count == self.pages[-1].capacity:
                size = min(max(FIRST_PAGE_TOKENS, self.count), LAST_PAGE_TOKENS)
                self.pages.append(Page(self.bits, self.geometry, size))
            page = self.pages[-1]
            stop = min(len(positions), done + page.capacity - page.count)
            part = slice(done, stop)
            page.append(keys.tokens(part), values.tokens(part), positions[part])
            done = stop

    def trim(self, length: int) -> None:
        """Drop every token at a position >= length."""
        while self.pages:
            page = self.pages[-1]
            page.count = int(np.searchsorted(page.positions[: page.count], length))
            if page.count:
                return
            self.pages.pop()
