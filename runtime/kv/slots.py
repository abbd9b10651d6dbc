"""Slots: room for the encoded vectors of tokens, in one of two layouts.

Values lie token by token. Keys lie in tiles of 16 tokens, word by word (see `precision.codecs.base`): word
j of all tokens of a tile, then word j + 1. A dot product with a query then runs down the tokens
of a tile in the lanes of a vector register, without sums across lanes.
"""

from __future__ import annotations

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


class Slots:
    """Room for the encoded vectors of `capacity` tokens in one of the two layouts.

    Args:
        codec: what the vectors are encoded with.
        geometry: layers, kv_heads, head_dim.
        capacity: tokens, a multiple of TILE_TOKENS.
        tiled: lie in tiles, word by word (keys), instead of token by token (values).
        lasting: will be there for long, so they may lie among what huge pages are made of.

    Attributes:
        codes: uint8 [layers, kv_heads, tiles, words, 16, 4] when tiled, else [layers, kv_heads, capacity, words, 4].
        scales: float16 [layers, kv_heads, capacity, 1 or 0].
        addresses: of the first byte of codes and of scales, for native code.
    """

    def __init__(self, codec: Codec, geometry: Geometry, capacity: int, tiled: bool, lasting: bool = True) -> None:
        words = codec.code_bytes(geometry.head_dim) // WORD_BYTES
        shape = (geometry.layers, geometry.kv_heads)
        layout = (capacity // TILE_TOKENS, words, TILE_TOKENS) if tiled else (capacity, words)
        self.codec = codec
        self.tiled = tiled
        zeros = hugepages.zeros if lasting else np.zeros
        self.codes = zeros((*shape, *layout, WORD_BYTES), np.uint8)
        self.scales = zeros((*shape, capacity, int(codec.has_scale)), np.float16)
        self.addresses = (self.codes.ctypes.data, self.scales.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.codes.nbytes + self.scales.nbytes

    def write(self, slots: slice | np.ndarray, new: Encoded) -> None:
        """Put the encoded tokens of all layers into slots."""
        self.scales[:, :, slots] = new.scales
        codes = new.codes.reshape(*new.codes.shape[:-1], new.codes.shape[-1] // WORD_BYTES, WORD_BYTES)
        if self.tiled:
            index = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
            by_token = self.codes.transpose(0, 1, 2, 4, 3, 5)
            by_token[:, :, index // TILE_TOKENS, index % TILE_TOKENS] = codes
        else:
            self.codes[:, :, slots] = codes

    def encoded(self, slots: slice | np.ndarray, layer: int | slice = slice(None)) -> Encoded:
        """Some tokens of one layer (or of all), token by token: arrays as in `Encoded`."""
        codes = self.codes[layer]
        if self.tiled:
            by_token = codes.swapaxes(-3, -2)  # [..., tiles, 16, words, 4]
            if isinstance(slots, slice):
                first = slots.start // TILE_TOKENS
                tiles = by_token[..., first : -(-slots.stop // TILE_TOKENS), :, :, :]
                whole = tiles.reshape(*tiles.shape[:-4], tiles.shape[-4] * TILE_TOKENS, *tiles.shape[-2:])
                skip = first * TILE_TOKENS
                codes = whole[..., slots.start - skip : slots.stop - skip, :, :]
            else:
                codes = by_token[..., slots // TILE_TOKENS, slots % TILE_TOKENS, :, :]
        else:
            codes = codes[..., slots, :, :]
        return Encoded(
            codes.reshape(*codes.shape[:-2], codes.shape[-2] * WORD_BYTES), self.scales[layer][..., slots, :]
        )

    def decode(self, slots: slice | np.ndarray, out: np.ndarray, layer: int | slice = slice(None)) -> None:
        """Decode some tokens of one layer (or of all) into out, float32 [(layers,) kv_heads, slots, head_dim]."""
        self.codec.decode(*self.encoded(slots, layer), out)
