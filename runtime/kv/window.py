"""The recent window: a ring of the newest tokens at 8 or 16 bits, with the precision each will be stored at."""

from __future__ import annotations

import numpy as np

from kvq.runtime.kv.slots import TILE_TOKENS, Slots
from kvq.runtime.precision.codecs import NUMPY
from kvq.runtime.precision.table import CHOICE_BYTES, Geometry


class RecentWindow:
    """A ring of the newest tokens; the token at position p lies in slot p % capacity.

    bits: 8 or 16, of every value.
    keys, values: codes and scales for `capacity` tokens, rounded up to whole tiles.
    chosen: uint8 [capacity, 2], the `Pair` each token will be stored at when it leaves; (0, 0) of an open one.
    open: newest tokens whose precision is not chosen yet.
    """

    def __init__(self, geometry: Geometry, capacity: int, bits: int = 16) -> None:
        room = -(-capacity // TILE_TOKENS) * TILE_TOKENS
        self.keys = Slots(NUMPY.windows[bits], geometry, room, tiled=True)
        self.values = Slots(NUMPY.windows[bits], geometry, room, tiled=False)
        self.geometry, self.bits = geometry, bits
        self.token_bytes = geometry.window_token_bytes(bits)
        self.chosen = np.zeros((capacity, CHOICE_BYTES), np.uint8)
        self.capacity = capacity
        self.count = 0
        self.open = 0
        self.nbytes = self.keys.nbytes + self.values.nbytes + self.chosen.nbytes  # of all slots, used or not

    def copy(self) -> RecentWindow:
        """A window of the same tokens."""
        twin = RecentWindow(self.geometry, self.capacity, self.bits)
        twin.take(self)
        return twin

    def take(self, other: RecentWindow) -> None:
        """Become a copy of a window of the same size and bits."""
        for new, old in ((self.keys, other.keys), (self.values, other.values)):
            new.codes[...], new.scales[...] = old.codes, old.scales
        self.chosen[...] = other.chosen
        self.count, self.open = other.count, other.open

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Ring slots of the positions [start, stop)."""
        return np.arange(start, stop) % self.capacity

    def read(self, slots: np.ndarray, layer: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Decoded keys and values of some slots, float32 [layers, kv_heads, slots, head_dim], or of one layer."""
        decoded = []
        for part in (self.keys, self.values):
            shape = part.codes.shape[:2] if layer is None else part.codes.shape[1:2]
            decoded.append(np.empty((*shape, len(slots), self.geometry.head_dim), np.float32))
            part.decode(slots, decoded[-1], slice(None) if layer is None else layer)
        return decoded[0], decoded[1]
