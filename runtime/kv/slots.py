"""Slots: room for the encoded vectors of tokens, in one of two layouts.

Values lie token by token. Keys lie in tiles of 16 tokens, word by word (see `precision.codecs.base`): word
j of all tokens of a tile, then word j + 1. A dot product with a query then runs down the tokens
of a tile in the lanes of a vector register, without sums across lanes.

Room for less than a tile, a half or a quarter of one, is cut from a tile that several layers share: layer l lies in
tile l // n, n layers a tile, from slot l % n * capacity of it on, keys and values alike. Kernels read whole tiles from
a layer's first slot on, so behind the last one there is as much room as they then read too far.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kvq.runtime.machine import hugepages
from kvq.runtime.precision.codecs import Codec
from kvq.runtime.precision.codecs.base import WORD_BYTES
from kvq.runtime.precision.table import Geometry

TILE_TOKENS = 16


class Encoded(NamedTuple):
    """Packed codes and scales of a run of tokens.

    codes: uint8 [layers, kv_heads, tokens, code_bytes]
    scales: float16 [layers, kv_heads, tokens, 1 or 0]

    Of a single layer, both without the first axis.
    """

    codes: np.ndarray
    scales: np.ndarray

    def tokens(self, index: slice | np.ndarray) -> Encoded:
        """Some tokens: views for a slice, copies for an index array."""
        return Encoded(self.codes[..., index, :], self.scales[..., index, :])


class Shapes(NamedTuple):
    """Shapes of the arrays that so many slots take, and what has to be behind them, in items."""

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    behind_codes: int
    behind_scales: int

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays and of what is behind them."""
        codes, scales = math.prod(self.codes) + self.behind_codes, math.prod(self.scales) + self.behind_scales
        return codes + 2 * scales


def shapes(codec: Codec, geometry: Geometry, capacity: int, tiled: bool) -> Shapes:
    """What `Slots` of these settings are made of."""
    words = codec.code_bytes(geometry.head_dim) // WORD_BYTES
    sharing = max(1, TILE_TOKENS // capacity) if capacity else 1
    room, further = (capacity, 0) if sharing == 1 else (TILE_TOKENS, TILE_TOKENS - capacity)
    heads = (-(-geometry.layers // sharing), geometry.kv_heads)
    layout = (room // TILE_TOKENS, words, TILE_TOKENS) if tiled else (room, words)
    scales = int(codec.has_scale)
    behind = further * WORD_BYTES * (1 if tiled else words)
    return Shapes((*heads, *layout, WORD_BYTES), (*heads, room, scales), behind, further * scales)


class Slots:
    """Room for the encoded vectors of `capacity` tokens in one of the two layouts.

    Args:
        codec: what the vectors are encoded with.
        geometry: layers, kv_heads, head_dim.
        capacity: tokens, a multiple of TILE_TOKENS, or a half or a quarter of it.
        tiled: lie in tiles, word by word (keys), instead of token by token (values).
        lasting: will be there for long, so they may lie among what huge pages are made of.

    Attributes:
        sharing: layers that share a tile, 1 where capacity is whole tiles; `groups` are layers / sharing, rounded up.
        codes: uint8 [groups, kv_heads, tiles, words, 16, 4] when tiled, else [groups, kv_heads, 16 * tiles, words, 4].
        scales: float16 [groups, kv_heads, 16 * tiles, 1 or 0].
        nbytes: bytes of both arrays and of what is behind them.
        addresses: of the first byte of codes and of scales, for native code.
    """

    def __init__(self, codec: Codec, geometry: Geometry, capacity: int, tiled: bool, lasting: bool = True) -> None:
        self.codec = codec
        self.tiled = tiled
        self.capacity = capacity
        self.sharing = max(1, TILE_TOKENS // capacity) if capacity else 1
        self._layers = geometry.layers
        shape = shapes(codec, geometry, capacity, tiled)
        self.codes = _zeros(shape.codes, shape.behind_codes, np.uint8, lasting)
        self.scales = _zeros(shape.scales, shape.behind_scales, np.float16, lasting)
        self.nbytes = shape.nbytes
        self.addresses = (self.codes.ctypes.data, self.scales.ctypes.data)

    def addresses_of(self, row: int) -> tuple[int, int]:
        """Of the first code and scale of a layer, the `row`-th one."""
        group, part = divmod(row, self.sharing)
        (codes, scales), skipped = self.addresses, part * self.capacity
        codes += group * self.codes.strides[0] + skipped * WORD_BYTES * (1 if self.tiled else self.codes.shape[-2])
        return codes, scales + group * self.scales.strides[0] + skipped * self.scales.shape[-1] * self.scales.itemsize

    def _part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of what the layers part, part + sharing, ... have of codes and scales; [layers / sharing, ...]."""
        if self.sharing == 1:
            return self.codes, self.scales
        groups = -(-(self._layers - part) // self.sharing)
        own = slice(part * self.capacity, (part + 1) * self.capacity)
        codes = self.codes[:groups, ..., own, :] if self.tiled else self.codes[:groups, :, own]
        return codes, self.scales[:groups, :, own]

    def write(self, slots: slice | np.ndarray, new: Encoded) -> None:
        """Put the encoded tokens of all layers into slots."""
        codes = new.codes.reshape(*new.codes.shape[:-1], new.codes.shape[-1] // WORD_BYTES, WORD_BYTES)
        index = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
        for part in range(min(self.sharing, self._layers)):
            to, scales = self._part(part)
            scales[:, :, slots] = new.scales[part :: self.sharing]
            if self.tiled:
                by_token = to.transpose(0, 1, 2, 4, 3, 5)
                by_token[:, :, index // TILE_TOKENS, index % TILE_TOKENS] = codes[part :: self.sharing]
            else:
                to[:, :, slots] = codes[part :: self.sharing]

    def encoded(self, slots: slice | np.ndarray, layer: int | slice = slice(None)) -> Encoded:
        """Some tokens of one layer (or of all), token by token: arrays as in `Encoded`."""
        if self.sharing == 1:
            return _by_token(self.codes[layer], self.scales[layer], slots, self.tiled)
        if isinstance(layer, int):
            codes, scales = self._part(layer % self.sharing)
            return _by_token(codes[layer // self.sharing], scales[layer // self.sharing], slots, self.tiled)
        single = [self.encoded(slots, i) for i in range(self._layers)[layer]]
        return Encoded(*(np.stack(arrays) for arrays in zip(*single, strict=True)))

    def decode(self, slots: slice | np.ndarray, out: np.ndarray, layer: int | slice = slice(None)) -> None:
        """Decode some tokens of one layer (or of all) into out, float32 [(layers,) kv_heads, slots, head_dim]."""
        self.codec.decode(*self.encoded(slots, layer), out)


def _zeros(shape: tuple[int, ...], behind: int, dtype: type[np.generic], lasting: bool) -> np.ndarray:
    """An array of zeros; `behind`: items of the same memory behind it."""
    if behind:
        size = math.prod(shape)
        return np.zeros(size + behind, dtype)[:size].reshape(shape)
    return hugepages.zeros(shape, dtype) if lasting else np.zeros(shape, dtype)


def _by_token(codes: np.ndarray, scales: np.ndarray, slots: slice | np.ndarray, tiled: bool) -> Encoded:
    """Some tokens of codes [..., tiles, words, 16, 4] when tiled, else [..., slots, words, 4], and scales
    [..., slots, 1 or 0]; a tile may have fewer than 16, if it is the only one.
    """
    if tiled:
        by_token = codes.swapaxes(-3, -2)  # [..., tiles, 16, words, 4]
        if isinstance(slots, slice):
            first = slots.start // TILE_TOKENS
            tiles = by_token[..., first : -(-slots.stop // TILE_TOKENS), :, :, :]
            whole = tiles.reshape(*tiles.shape[:-4], tiles.shape[-4] * tiles.shape[-3], *tiles.shape[-2:])
            skip = first * TILE_TOKENS
            codes = whole[..., slots.start - skip : slots.stop - skip, :, :]
        else:
            codes = by_token[..., slots // TILE_TOKENS, slots % TILE_TOKENS, :, :]
    else:
        codes = codes[..., slots, :, :]
    return Encoded(codes.reshape(*codes.shape[:-2], codes.shape[-2] * WORD_BYTES), scales[..., slots, :])
