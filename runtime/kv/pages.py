"""Pages: fixed-capacity arrays of tokens that share one pair of precisions.

A page holds all layers and KV heads of its tokens. Tokens are only ever added behind the
last one or dropped from the end, and a stored token's bytes never change. All pages of a bucket but
the last are full and of one size; the last one begins with a quarter of a tile and grows, a tile at a time, in a copy,
until it has that size, too. So number and sizes of pages follow from the bucket's count of tokens alone.

Forked buckets share their pages. A shared page never changes again: whoever wants to add to it or
to drop tokens from it goes on with a copy of its own.
"""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.kv.slots import TILE_TOKENS, Encoded, Slots, shapes
from kvq.runtime.machine import hugepages
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import POSITION_BYTES, Geometry, Pair

PAGE_TOKENS = 128  # of a full page: a long bucket is a few hundred arrays at most


def last_capacity(tokens: int, layers: int) -> int:
    """Tokens that a last page has room for when it has to hold so many, 1 to PAGE_TOKENS.

    Less than a tile is for models with more than a layer or two: others would have nothing to share it.
    """
    for part in (4, 2):
        if tokens <= TILE_TOKENS // part and layers > part // 2:
            return TILE_TOKENS // part
    return -(-tokens // TILE_TOKENS) * TILE_TOKENS


def page_nbytes(pair: Pair, geometry: Geometry, capacity: int) -> int:
    """Bytes of a page's arrays, free room included."""
    sides = (CODECS[pair.k], True), (CODECS[pair.v], False)
    codes_and_scales = sum(shapes(codec, geometry, capacity, tiled).nbytes for codec, tiled in sides)
    return codes_and_scales + POSITION_BYTES * capacity


class BucketBytes:
    """Bytes of the pages of a bucket, by the tokens it holds: `BucketBytes(...)[tokens]`, free room included.

    most_free: most bytes of free room that it can have.
    """

    def __init__(self, pair: Pair, geometry: Geometry) -> None:
        self._full = page_nbytes(pair, geometry, PAGE_TOKENS)
        rooms = [last_capacity(n, geometry.layers) for n in range(1, PAGE_TOKENS)]
        self._last = [0, *(page_nbytes(pair, geometry, room) for room in rooms)]
        self.most_free = max(nbytes - n * geometry.token_bytes(pair) for n, nbytes in enumerate(self._last))

    def __getitem__(self, tokens: int) -> int:
        full, rest = divmod(tokens, PAGE_TOKENS)
        return full * self._full + self._last[rest]


class Page:
    """Room for `capacity` tokens of one `Pair`; `count` of them are used.

    narrow: it holds the layers that have no window alone: the others see none of its tokens any more.
    shared: other buckets may hold this page too, so it must not change any more.
    row: where its arrays are, for native code, which fills it in.
    settled: its memory has been put on huge pages, or is not worth it, see `settle`.
    """

    def __init__(self, pair: Pair, geometry: Geometry, capacity: int, narrow: bool = False) -> None:
        self.pair = pair
        self.geometry = geometry
        self.narrow = narrow
        self.capacity = capacity
        self.count = 0
        self.shared = False
        self.row: ctypes.Array[ctypes.c_char] | None = None
        held = geometry.narrow if narrow else geometry
        # A smaller one will be replaced soon; a narrow one may hold nothing at all.
        self.settled = capacity < PAGE_TOKENS or narrow
        self.keys = Slots(CODECS[pair.k], held, capacity, tiled=True, lasting=not self.settled)
        self.values = Slots(CODECS[pair.v], held, capacity, tiled=False, lasting=not self.settled)
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
        positions; key codes of whole tiles, and of the begun one; key scales; value codes and scales. Only of a page
        of whole tiles.
        """
        stop = self.count if stop is None else stop
        first, (tiles, rest) = start // TILE_TOKENS, divmod(stop, TILE_TOKENS)
        keys, values, used = self.keys, self.values, slice(start, stop)
        begun = keys.codes[:, :, tiles : tiles + bool(rest), :, :rest]
        return [
            *(self.positions[used], keys.codes[:, :, first:tiles], begun, keys.scales[:, :, used]),
            *(values.codes[:, :, used], values.scales[:, :, used]),
        ]

    @property
    def whole_tiles(self) -> bool:
        """It has room for whole tiles, not for a part of one, whose layers share tiles."""
        return self.capacity >= TILE_TOKENS

    def copy(self, count: int, capacity: int) -> Page:
        """A page of that capacity that holds the first `count` tokens and is nobody else's."""
        twin = Page(self.pair, self.geometry, capacity)
        if self.whole_tiles and twin.whole_tiles:
            twin.count = count
            for new, old in zip(twin.parts(), self.parts(0, count), strict=True):
                new[...] = old
        elif count:
            used = slice(0, count)
            twin.append(self.keys.encoded(used), self.values.encoded(used), self.positions[used])
        return twin

    def read(self, layer: int, start: int, stop: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Decode one layer's tokens [start, stop) into keys, values float32 [kv_heads, stop - start, head_dim]."""
        row = self.geometry.wide.index(layer) if self.narrow else layer
        for part, out in ((self.keys, keys), (self.values, values)):
            part.decode(slice(start, stop), out, row)

    def narrowed(self) -> Page:
        """A narrow page of the same tokens; of a full one."""
        twin, wide = Page(self.pair, self.geometry, self.capacity, narrow=True), self.geometry.wide
        for new, old in ((twin.keys, self.keys), (twin.values, self.values)):
            new.codes[...], new.scales[...] = old.codes[wide], old.scales[wide]
        twin.positions[...], twin.count = self.positions, self.count
        return twin


def settle(pages: list[Page]) -> None:
    """Put the pages' memory on huge pages, once enough of it is new: a step reads all of it."""
    new = sum(page.nbytes for page in pages if not page.settled)
    if new < 2 * hugepages.HUGE_PAGE or new < sum(page.nbytes for page in pages) // 8 or not hugepages.wanted():
        return
    codes = [side.codes for page in pages for side in (page.keys, page.values)]
    hugepages.collapse((array.ctypes.data, array.ctypes.data + array.nbytes) for array in codes)
    for page in pages:
        page.settled = True
