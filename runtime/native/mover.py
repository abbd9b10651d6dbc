"""The way of new tokens through the store, carried out in C after a forward pass."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import numpy as np

from kvq.runtime.kv.moves import Move
from kvq.runtime.kv.pages import Page
from kvq.runtime.kv.window import RecentWindow
from kvq.runtime.native.library import MOST_CHANNELS, Moves, MoveStep, check, known_precisions, load
from kvq.runtime.native.pool import move_on_pool
from kvq.runtime.native.table import address_of, as_buffer, page_row, window_rows
from kvq.runtime.native.turns import MovedTurns
from kvq.runtime.precision.codecs import CodecSet
from kvq.runtime.precision.table import Pair

MANY = 16  # tokens whose way several threads share; handing it to them takes as long as some tokens do


def write_steps(to: ctypes.Array[MoveStep], moves: list[Move], pages: list[Page]) -> None:
    """The moves as C has them; pages: those of the rows that the steps count by."""
    number = {id(page): i for i, page in enumerate(pages)} | {id(None): -1}
    for step, (slot, page, page_slot) in zip(to, moves, strict=True):
        step.window_slot, step.page, step.page_slot = slot, number[id(page)], page_slot


class NativeMover:
    """A `kvq.runtime.kv.moves.Mover`: one call for all of a forward pass's tokens instead of some thirty of numpy's.

    What it is given is mostly what it was given before, a pass's arrays and the window, so their addresses are kept:
    after a forward pass every call of Python's costs microseconds.
    """

    def __init__(self, kernel: int) -> None:
        self._library = load()
        self._known = known_precisions()
        self._move = Moves(kernel=kernel)
        self._window: RecentWindow | None = None
        self._arrays: tuple[Callable[[], np.ndarray | None], ...] = (lambda: None,) * 2
        self._fit = False
        self._feedback: np.ndarray | None = None
        self._pages: list[Page] = []
        self._window_rows = self._page_rows = as_buffer(b"")
        self._steps = (MoveStep * 0)()
        self._turned = MovedTurns()

    def takes(
        self, window: RecentWindow, gone: list[Pair], keys: np.ndarray, values: np.ndarray, codecs: CodecSet
    ) -> bool:
        """See `Mover`; of `gone` it takes the precisions that the library knows."""
        self._point_at(keys, values)
        self._move.reach = 0.0 if codecs.turns is None else codecs.turns.reach
        found = {precision for pair in set(gone) for precision in window.geometry.precisions(pair)}
        if not window.capacity or not self._fit or not self._known.issuperset(found):
            return False
        return bool(check(self._library.kvq_movable(self._move)))

    def __call__(
        self,
        window: RecentWindow,
        moves: list[Move],
        keys: np.ndarray,
        values: np.ndarray,
        codecs: CodecSet,
    ) -> None:
        self._point_at(keys, values)
        move = self._move
        if codecs.feedback is not self._feedback:
            self._feedback, move.feedback = codecs.feedback, address_of(codecs.feedback)
        self._turned.write(move, codecs, moves)
        pages = list({id(page): page for _, page, _ in moves if page is not None}.values())
        if window is not self._window:
            self._window, self._window_rows = window, as_buffer(window_rows(window))
            move.window = ctypes.addressof(self._window_rows)
        if pages != self._pages:
            rows = [page_row(page) for page in pages]
            self._pages, self._page_rows = pages, rows[0] if len(rows) == 1 else as_buffer(b"".join(rows))
            move.page, move.pages = ctypes.addressof(self._page_rows), len(pages)
        if len(moves) != len(self._steps):
            self._steps = (MoveStep * len(moves))()
            move.step = ctypes.addressof(self._steps)
        write_steps(self._steps, moves, pages)
        if len(moves) < MANY:
            check(self._library.kvq_move_tokens(move))
        else:
            move_on_pool(move)

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
