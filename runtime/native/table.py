"""The page table: where the native library finds a store's tokens."""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.kv.pages import Page, settle
from kvq.runtime.kv.store import KVStore
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.native.library import CHUNK_SLOTS, LAYER, PAGE, known_precisions
from kvq.runtime.precision.table import Pair


def address_of(x: np.ndarray | None) -> int | None:
    """Where an array's first item is; None for none."""
    return None if x is None else x.ctypes.data


class PageTable:
    """Rows of `PAGE` for one store, kept up to date from step to step.

    Pages come and go rarely, their counts change with every token: `update` rewrites the rows
    only when the list of pages is another one.

    Args:
        settles: new pages are put on huge pages, see `pages.settle`. It takes milliseconds and pays where all pages are
            read for every token, so prefill leaves it to the first step of decoding.

    Attributes:
        rows: as `update` returned them last.
        address: of the first one.
        pages: those of the first rows; the rest are the window's.
        foreign: pairs among them that the library has no kernels for. It refuses the table then.
    """

    def __init__(self, settles: bool = False) -> None:
        self._settles = settles
        self._known = known_precisions()
        self.foreign: list[Pair] = []
        self.rows = np.zeros(0, PAGE)
        self.address = 0
        self.pages: list[Page] = []
        self._window: RecentWindow | None = None
        self._counts = self._ring_counts = self._ring_firsts = self.rows

    def update(self, store: KVStore, window: RecentWindow | None = None) -> np.ndarray:
        """The rows for the store as it is now, pages made ahead among them; valid until it changes or the next call.

        window: stands in for the store's own.
        """
        pages = [page for bucket in store.buckets.values() for page in (*bucket.pages, *bucket.ahead)]
        window = store.window if window is None else window
        if window is not self._window or pages != self.pages:
            if self._settles:
                settle(pages)
            self.pages, self._window = pages, window
            pairs = dict.fromkeys(page.pair for page in pages)
            self.foreign = [pair for pair in pairs if not self._known.issuperset(store.geometry.precisions(pair))]
            rows = b"".join([*(page_row(page) for page in pages), window_rows(window)])
            self.rows = np.frombuffer(bytearray(rows), PAGE)
            self.address = self.rows.ctypes.data
            counts = self.rows["count"]
            self._counts, self._ring_counts = counts[: len(pages)], counts[len(pages) :]
            self._ring_firsts = self.rows["first"][len(pages) :]
        self._counts[:] = [page.count for page in pages]
        if window.capacity:
            self._ring_counts.fill(window.count)
            # A full ring holds a token in every slot: where it begins does not matter then.
            first = 0 if window.count == window.capacity else (store.length - window.count) % window.capacity
            self._ring_firsts.fill(first)
        return self.rows


def page_row(page: Page) -> ctypes.Array[ctypes.c_char]:
    """The row of a page, a `PAGE` without its count; made once, since its arrays stay where they are."""
    if page.row is None:
        size, layers = page.capacity, 0
        narrow, positions = int(page.narrow), page.positions.ctypes.data
        arrays: tuple[int, ...] = (0,) * 6
        if len(page.keys.slots) == len(page.values.slots) == 1:
            both = page.keys.slots[0], page.values.slots[0]
            arrays = (*both[0].addresses, *both[1].addresses, *(slots.codec.precision.id for slots in both))
        else:
            page.layer_rows = as_buffer(_layer_rows(page))
            layers = ctypes.addressof(page.layer_rows)
        row = (*arrays, size, 0, size, 0, 0, size, narrow, 0, positions, layers)
        page.row = as_buffer(np.array(row, PAGE).tobytes())
    return page.row


def _layer_rows(page: Page) -> bytes:
    """Where a page has each layer, zeros of one that it does not hold: a `LAYER` for each."""
    geometry = page.geometry
    rows = np.zeros(geometry.layers, LAYER)
    for row, layer in enumerate(geometry.wide if page.narrow else range(geometry.layers)):
        keys, values = (side.slots_of(row) for side in (page.keys, page.values))
        addresses = (*keys[0].addresses_of(keys[1]), *values[0].addresses_of(values[1]))
        rows[layer] = (*addresses, keys[0].codec.precision.id, values[0].codec.precision.id)
    return rows.tobytes()


def as_buffer(row: bytes) -> ctypes.Array[ctypes.c_char]:
    """The bytes of some rows, in memory with an address."""
    return (ctypes.c_char * len(row)).from_buffer_copy(row)


def window_rows(window: RecentWindow) -> bytes:
    """The rows of a recent window, without what changes from step to step."""
    own = window.keys.codec.precision.id
    addresses = (*window.keys.addresses, *window.values.addresses)
    room = window.keys.scales.shape[-2]
    rows = [
        (*addresses, own, own, room, begin, min(begin + CHUNK_SLOTS, room), 0, 0, window.capacity, 0, 0, 0, 0)
        for begin in range(0, room, CHUNK_SLOTS)
    ]
    return np.array(rows, PAGE).tobytes()
