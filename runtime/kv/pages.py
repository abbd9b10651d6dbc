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

from kvq.runtime.kv.sides import Side, last_capacity, parts_of, side_nbytes
from kvq.runtime.kv.slots import TILE_TOKENS, Encoded
from kvq.runtime.machine import hugepages
from kvq.runtime.precision.table import POSITION_BYTES, Geometry, Pair

PAGE_TOKENS = 128  # of a full page: a long bucket is a few hundred arrays at most


def page_nbytes(pair: Pair, geometry: Geometry, capacity: int) -> int:
    """Bytes of a page's arrays, free room included."""
    sides = zip(parts_of(pair, geometry), (True, False), strict=True)
    return sum(side_nbytes(parts, geometry, capacity, tiled) for parts, tiled in sides) + POSITION_BYTES * capacity


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
    layer_rows: the same of every layer, where these have precisions of their own.
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
        self.layer_rows: ctypes.Array[ctypes.c_char] | None = None
        held = geometry.narrow if narrow else geometry
        # A smaller one will be replaced soon; a narrow one may hold nothing at all.
        self.settled = capacity < PAGE_TOKENS or narrow
        keys, values = parts_of(pair, held)
        self.keys = Side(keys, held, capacity, tiled=True, lasting=not self.settled)
        self.values = Side(values, held, capacity, tiled=False, lasting=not self.settled)
        self.positions = np.zeros(capacity, np.int32)  # the tag of a token: where it stands in the text
        self.nbytes = self.keys.nbytes + self.values.nbytes + self.positions.nbytes  # of all arrays, free room included

    def append(self, keys: list[Encoded], values: list[Encoded], positions: np.ndarray) -> None:
        """Add the tokens behind the last one, as `Side.write` takes them; the caller has checked that they fit."""
        start, stop = self.count, self.count + len(positions)
        self.keys.write(slice(start, stop), keys)
        self.values.write(slice(start, stop), values)
        self.positions[start:stop] = positions
        self.count = stop

    def parts(self, start: int = 0, stop: int | None = None) -> list[np.ndarray]:
        """Views of what is used of each array, or of the tokens from `start`, the first one of a tile, up to `stop`:
        positions; key codes of whole tiles, and of the begun one, and key scales, of every part of the keys; codes and
        scales of every part of the values. Only of a page of whole tiles.
        """
        stop = self.count if stop is None else stop
        first, (tiles, rest) = start // TILE_TOKENS, divmod(stop, TILE_TOKENS)
        used, found = slice(start, stop), [self.positions[start:stop]]
        for keys in self.keys.slots:
            begun = keys.codes[:, :, tiles : tiles + bool(rest), :, :rest]
            found += [keys.codes[:, :, first:tiles], begun, keys.scales[:, :, used]]
        for values in self.values.slots:
            found += [values.codes[:, :, used], values.scales[:, :, used]]
        return found

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
        for side, out in ((self.keys, keys), (self.values, values)):
            side.decode(slice(start, stop), out, row)

    def narrowed(self) -> Page:
        """A narrow page of the same tokens; of a full one."""
        twin, wide = Page(self.pair, self.geometry, self.capacity, narrow=True), self.geometry.wide
        for new, old in ((twin.keys, self.keys), (twin.values, self.values)):
            new.take(old, wide)
        twin.positions[...], twin.count = self.positions, self.count
        return twin


def settle(pages: list[Page]) -> None:
    """Put the pages' memory on huge pages, once enough of it is new: a step reads all of it."""
    new = sum(page.nbytes for page in pages if not page.settled)
    if new < 2 * hugepages.HUGE_PAGE or new < sum(page.nbytes for page in pages) // 8 or not hugepages.wanted():
        return
    codes = [slots.codes for page in pages for side in (page.keys, page.values) for slots in side.slots]
    hugepages.collapse((array.ctypes.data, array.ctypes.data + array.nbytes) for array in codes)
    for page in pages:
        page.settled = True
