"""What fixes the size of a stored token: the shape of its vectors, and the bits of its keys and values."""

from __future__ import annotations

from typing import NamedTuple


class Bits(NamedTuple):
    """Bits per value of a token's keys and values, metadata not counted."""

    k: int
    v: int

    def __str__(self) -> str:
        return f"k{self.k}v{self.v}"


class Geometry(NamedTuple):
    """What fixes the shape of every stored token."""

    layers: int
    kv_heads: int
    head_dim: int
