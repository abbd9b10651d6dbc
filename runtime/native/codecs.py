"""The codecs with native encoding: the same bytes as numpy's, in a fraction of the time."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import numpy as np

from kvq.runtime.codecs import NUMPY, Codec, CodecSet
from kvq.runtime.native.library import PAGE, WINDOW_BITS, Move, MoveStep, load
from kvq.runtime.native.table import page_row, window_rows
from kvq.runtime.pages import Page
from kvq.runtime.store import RecentWindow, Step

MOST_CHANNELS = 1024


class NativeCodec(Codec):
    """A numpy codec whose `encode` runs in C; what C refuses is given to numpy, which says why."""

    def __init__(self, reference: Codec, code: int, kernel: int) -> None:
        self.reference = reference
        self.bits, self.has_scale = reference.bits, reference.has_scale
        self._library, self._code, self._kernel = load(), code, kernel

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        head_dim = x.shape[-1]
        if head_dim > MOST_CHANNELS:
            return self.reference.encode(x)
        x = np.ascontiguousarray(x, np.float32)
        codes = np.empty((*x.shape[:-1], self.code_bytes(head_dim)), np.uint8)
        scales = np.empty((*x.shape[:-1], int(self.has_scale)), np.float16)
        vectors = x.size // head_dim
        arrays = (x.ctypes.data, vectors, head_dim, codes.ctypes.data, scales.ctypes.data)
        if self._library.kvq_encode(self._kernel, self._code, *arrays):
            return self.reference.encode(x)
        return codes, scales

    def decode(self, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        self.reference.decode(codes, scales, out)


def _in_memory(rows: list[tuple[int, ...]]) -> ctypes.Array[ctypes.c_char]:
    """Rows of the page table where C can read them."""
    return ctypes.create_string_buffer(np.array(rows, PAGE).tobytes())


class NativeMover:
    """A `kvq.runtime.store.Mover`: one call for all of a forward pass's tokens instead of some thirty of numpy's.

    What it is given is mostly what it was given before, a pass's arrays and the window, so their addresses are kept:
    after a forward pass every call of Python's costs microseconds.
    """

    def __init__(self, kernel: int) -> None:
        self._library, self._kernel = load(), kernel
        self._move = Move(kernel=kernel)
        self._window: RecentWindow | None = None
        self._arrays: tuple[Callable[[], np.ndarray | None], ...] = (lambda: None,) * 2
        self._fit = False
        self._pages: dict[int, Page] = {}
        self._window_row = self._page_rows = _in_memory([])

    def takes(self, window: RecentWindow, keys: np.ndarray, values: np.ndarray) -> bool:
        self._point_at(keys, values)
        move = self._move
        storable, size = self._library.kvq_storable, keys.size
        return (
            window.capacity > 0
            and self._fit
            and bool(storable(self._kernel, move.keys, size) and storable(self._kernel, move.values, size))
        )

    def __call__(self, window: RecentWindow, steps: list[Step], keys: np.ndarray, values: np.ndarray) -> None:
        self._point_at(keys, values)
        move = self._move
        if window is not self._window:
            self._window, self._window_row = window, _in_memory(window_rows(window)[:1])
            move.window = ctypes.addressof(self._window_row)
        pages = {id(page): page for _, page, _ in steps if page is not None}
        if pages.keys() != self._pages.keys():
            self._pages, self._page_rows = pages, _in_memory([page_row(page) for page in pages.values()])
            move.page = ctypes.addressof(self._page_rows)
        number = {page: i for i, page in enumerate(self._pages)}
        table = (MoveStep * len(steps))(*(MoveStep(slot, number.get(id(page), -1), at) for slot, page, at in steps))
        move.step = ctypes.addressof(table)
        self._library.kvq_move_tokens(ctypes.byref(move))

    def _point_at(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Have the call in C read these arrays, where they are not those of the last time."""
        if keys is self._arrays[0]() and values is self._arrays[1]():
            return
        move = self._move
        self._arrays, self._fit = (weakref.ref(keys), weakref.ref(values)), _fit(keys) and _fit(values)
        move.layers, move.kv_heads, move.tokens, move.head_dim = keys.shape
        move.keys, move.values = keys.ctypes.data, values.ctypes.data


def _fit(x: np.ndarray) -> bool:
    """Whether keys or values of all layers are as C reads them."""
    return x.shape[-1] <= MOST_CHANNELS and x.dtype == np.float32 and x.flags.c_contiguous


def native_codecs(kernel: int) -> CodecSet:
    """The codecs for an instruction set, see `library.kernels`."""
    by_bits: dict[int, Codec] = {bits: NativeCodec(codec, bits, kernel) for bits, codec in NUMPY.by_bits.items()}
    return CodecSet(by_bits, NativeCodec(NUMPY.window, WINDOW_BITS, kernel), NativeMover(kernel))
