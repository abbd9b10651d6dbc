"""The codecs with native encoding: the same bytes as numpy's, in a fraction of the time."""

from __future__ import annotations

import ctypes

import numpy as np

from kvq.runtime.codecs import NUMPY, Codec, CodecSet
from kvq.runtime.native.library import PAGE, WINDOW_BITS, Move, load
from kvq.runtime.native.table import page_row, window_rows
from kvq.runtime.pages import Page
from kvq.runtime.store import RecentWindow

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


def _in_memory(row: tuple[int, ...]) -> ctypes.Array[ctypes.c_char]:
    """A row of the page table where C can read it."""
    return ctypes.create_string_buffer(np.array([row], PAGE).tobytes())


class NativeMover:
    """A `kvq.runtime.store.Mover`: one call a decode step instead of some thirty of numpy's."""

    def __init__(self, kernel: int) -> None:
        self._library, self._kernel = load(), kernel
        self._window: RecentWindow | None = None
        self._page: Page | None = None
        self._window_row = self._page_row = ctypes.create_string_buffer(PAGE.itemsize)
        self._move = Move()

    def __call__(
        self, window: RecentWindow, slot: int, page: Page | None, keys: np.ndarray, values: np.ndarray
    ) -> bool:
        layers, kv_heads, _, head_dim = keys.shape
        if not (keys.flags.c_contiguous and values.flags.c_contiguous and keys.dtype == values.dtype == np.float32):
            return False
        if window is not self._window:
            self._window, self._window_row = window, _in_memory(window_rows(window)[0])
            self._move = Move(layers, kv_heads, head_dim, self._kernel, None, None, ctypes.addressof(self._window_row))
        if page is not None and page is not self._page:
            self._page, self._page_row = page, _in_memory(page_row(page))
        move = self._move
        move.keys, move.values, move.window_slot = keys.ctypes.data, values.ctypes.data, slot
        move.page = None if page is None else ctypes.addressof(self._page_row)
        move.page_slot = 0 if page is None else page.count
        return self._library.kvq_move_token(ctypes.byref(move)) == 0


def native_codecs(kernel: int) -> CodecSet:
    """The codecs for an instruction set, see `library.kernels`."""
    by_bits: dict[int, Codec] = {bits: NativeCodec(codec, bits, kernel) for bits, codec in NUMPY.by_bits.items()}
    return CodecSet(by_bits, NativeCodec(NUMPY.window, WINDOW_BITS, kernel), NativeMover(kernel))
