"""Sides: the keys, or the values, of a page, in parts: layers of one precision lie together.

Mostly all layers have one precision and there is one part. A class of tokens whose precisions are chosen by layer
(`Geometry.profiles`) has as many parts as there are precisions in it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from kvq.runtime.kv.slots import TILE_TOKENS, Encoded, Slots, shapes
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Geometry, Pair


class Part(NamedTuple):
    """Layers that have one precision.

    precision: its id.
    layers: slice(None), all there are, or a list of them, ascending.
    """

    precision: int
    layers: slice | list[int]

    def count(self, geometry: Geometry) -> int:
        """How many layers they are."""
        return geometry.layers if isinstance(self.layers, slice) else len(self.layers)


@functools.lru_cache(maxsize=1024)
def parts_of(pair: Pair, geometry: Geometry) -> tuple[list[Part], list[Part]]:
    """Parts of the keys and of the values of tokens of a pair, in the order of their precisions' ids."""
    keys, values = zip(*geometry.by_layer(pair), strict=True) if geometry.layers else ((pair[0],), (pair[1],))
    return _parts(keys), _parts(values)


def _parts(by_layer: tuple[int, ...]) -> list[Part]:
    found = sorted(set(by_layer))
    if len(found) == 1:
        return [Part(found[0], slice(None))]
    return [Part(id_, [layer for layer, own in enumerate(by_layer) if own == id_]) for id_ in found]


def last_capacity(tokens: int, layers: int) -> int:
    """Tokens that arrays of so many layers have room for when they have to hold at least so many.

    Less than a tile is for more than a layer or two: others would have nothing to share it.
    """
    for part in (4, 2):
        if tokens <= TILE_TOKENS // part and layers > part // 2:
            return TILE_TOKENS // part
    return -(-tokens // TILE_TOKENS) * TILE_TOKENS


def side_nbytes(parts: list[Part], geometry: Geometry, capacity: int, tiled: bool) -> int:
    """Bytes of the arrays of a `Side`, free room included."""
    return sum(
        shapes(CODECS[part.precision], held, room, tiled).nbytes
        for part in parts
        for held, room in [_room(part, geometry, capacity)]
    )


def _room(part: Part, geometry: Geometry, capacity: int) -> tuple[Geometry, int]:
    """Of the arrays of a part, of a page of so many tokens: few layers of it share tiles less."""
    layers = part.count(geometry)
    held = Geometry(layers, geometry.kv_heads, geometry.head_dim)
    return held, capacity if layers == geometry.layers else last_capacity(capacity, layers)


class Side:
    """Room for the keys, or the values, of `capacity` tokens.

    Args:
        parts: of its layers.
        geometry: of what it holds.
        capacity, tiled, lasting: as of `Slots`.

    Attributes:
        slots: of each part; layers of it are rows there, in order.
        nbytes: bytes of all arrays.
    """

    def __init__(self, parts: list[Part], geometry: Geometry, capacity: int, tiled: bool, lasting: bool) -> None:
        self._parts = parts
        rooms = [_room(part, geometry, capacity) for part in parts]
        self.slots = [
            Slots(CODECS[part.precision], held, room, tiled, lasting)
            for part, (held, room) in zip(parts, rooms, strict=True)
        ]
        self.nbytes = sum(slots.nbytes for slots in self.slots)

    def slots_of(self, layer: int) -> tuple[Slots, int]:
        """Where a layer is: the slots of its part, and its row there."""
        if len(self.slots) == 1:
            return self.slots[0], layer
        for part, slots in zip(self._parts, self.slots, strict=True):
            if isinstance(part.layers, list) and layer in part.layers:
                return slots, part.layers.index(layer)
        raise IndexError(f"no layer {layer}")

    def write(self, at: slice | np.ndarray, new: list[Encoded]) -> None:
        """Put encoded tokens into slots: of every part its layers, one after the other."""
        for slots, one in zip(self.slots, new, strict=True):
            slots.write(at, one)

    def encoded(self, at: slice | np.ndarray) -> list[Encoded]:
        """Some tokens as `write` takes them."""
        return [slots.encoded(at) for slots in self.slots]

    def decode(self, at: slice | np.ndarray, out: np.ndarray, layer: int) -> None:
        """Decode some tokens of one layer into out, float32 [kv_heads, slots, head_dim]."""
        slots, row = self.slots_of(layer)
        slots.decode(at, out, row)

    def take(self, other: Side, layers: list[int]) -> None:
        """Become a copy of some layers of a side of whole tiles and as much room; its own are these, in order."""
        for own, layer in enumerate(layers):
            (slots, row), (of_other, other_row) = self.slots_of(own), other.slots_of(layer)
            slots.codes[row], slots.scales[row] = of_other.codes[other_row], of_other.scales[other_row]
