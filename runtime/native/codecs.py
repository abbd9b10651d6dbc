"""The codecs with native encoding: the same bytes as numpy's, in a fraction of the time."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import numpy as np

from kvq.runtime.kv.moves import Move
from kvq.runtime.kv.pages import Page
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.native.library import WINDOW_BITS, Moves, MoveStep, load
from kvq.runtime.native.table import as_buffer, page_row, window_rows
from kvq.runtime.precision.codecs import NUMPY, Codec, CodecSet

MOST_CHANNELS = 1024


class NativeCodec(Codec):
    """A numpy codec whose `encode` runs in C; what C refuses is given to numpy, which says why."""

    def __init__(self, reference: Codec, code: int, kernel: int) -> None:
        self.reference = reference
        self.precision, self.has_scale = reference.precision, reference.has_scale
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


class NativeMover:
    """A `kvq.runtime.kv.moves.Mover`: one call for all of a forward pass's tokens instead of some thirty of numpy's.

    What it is given is mostly what it was given before, a pass's arrays and the window, so their addresses are kept:
    after a forward pass every call of Python's costs microseconds.
    """

    def __init__(self, kernel: int) -> None:
        self._library = load()
        self._move = Moves(kernel=kernel)
        self._window: RecentWindow | None = None
        self._arrays: tuple[Callable[[], np.ndarray | None], ...] = (lambda: None,) * 2
        self._fit = False
        self._pages: list[Page] = []
        self._window_rows = self._page_rows = as_buffer(b"")
        self._steps = (MoveStep * 0)()

    def takes(self, window: RecentWindow, keys: np.ndarray, values: np.ndarray) -> bool:
        """Whether C can move these tokens, float32 [layers, kv_heads, tokens, head_dim]; otherwise numpy has to."""
        self._point_at(keys, values)
        return window.capacity > 0 and self._fit and bool(self._library.kvq_movable(self._move))

    def __call__(self, window: RecentWindow, moves: list[Move], keys: np.ndarray, values: np.ndarray) -> None:
        self._point_at(keys, values)
        move = self._move
        pages = list({id(page): page for _, page, _ in moves if page is not None}.values())
        if window is not self._window:
            self._window, self._window_rows = window, as_buffer(window_rows(window))
            move.window = ctypes.addressof(self._window_rows)
        if pages != self._pages:
            rows = [page_row(page) for page in pages]
            self._pages, self._page_rows = pages, rows[0] if len(rows) == 1 else as_buffer(b"".join(rows))
            move.page = ctypes.addressof(self._page_rows)
        if len(moves) != len(self._steps):
            self._steps = (MoveStep * len(moves))()
            move.step = ctypes.addressof(self._steps)
        number = {id(page): i for i, page in enumerate(pages)}
        for to, (slot, page, at) in zip(self._steps, moves, strict=True):
            to.window_slot, to.page, to.page_slot = slot, number.get(id(page), -1), at
        self._library.kvq_move_tokens(move)

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
    by_id: dict[int, Codec] = {id_: NativeCodec(codec, id_, kernel) for id_, codec in NUMPY.by_id.items()}
    return CodecSet(by_id, NativeCodec(NUMPY.window, WINDOW_BITS, kernel), NativeMover(kernel))
