"""The table of what is stored: pairs of precisions, the shape of a token, and every formula for its bytes."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from kvq.runtime.precision.codecs import CODECS, NUMPY

POSITION_BYTES = 4  # the tag of a token in a page: where it stands in the text
CHOICE_BYTES = 2  # the tag of a token in the recent window: the pair it will be stored at


class Pair(NamedTuple):
    """The precisions of a token, by id: of its keys, of its values."""

    k: int
    v: int

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a code of its keys, of its values; an id need not be one."""
        return CODECS[self.k].bits, CODECS[self.v].bits

    def __str__(self) -> str:
        return f"k{CODECS[self.k].precision.name}v{CODECS[self.v].precision.name}"


_BY_NAME = {codec.precision.name: id_ for id_, codec in CODECS.items()}


def named(k: str, v: str | None = None) -> Pair:
    """The pair of the precisions of these names, "4" and "3" for k4v3; one name is that of keys and values."""
    return Pair(_BY_NAME[k], _BY_NAME[k if v is None else v])


EXACT = Pair(16, 16)
# What the newest and the first tokens of a text are kept at, whatever a policy says, by bits.
PROTECTED = {8: Pair(8, 8), 16: EXACT}


def pairs() -> list[Pair]:
    """Every pair there is, in the order of the codecs' ids."""
    return [Pair(k, v) for k, v in product(CODECS, CODECS)]


class Geometry(NamedTuple):
    """What fixes the size of every stored token."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def values(self) -> int:
        """Numbers that a token holds, keys and values of all layers: what bits per value are counted by."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def window_token_bytes(self, bits: int) -> int:
        """Bytes of a token in the recent window of so many bits: codes, scales and its choice."""
        return 2 * self.layers * self.kv_heads * NUMPY.windows[bits].vector_bytes(self.head_dim) + CHOICE_BYTES

    def token_bytes(self, pair: tuple[int, int]) -> int:
        """Bytes of a token in a page: codes and scales of all layers and heads, and its position."""
        each = sum(CODECS[precision].vector_bytes(self.head_dim) for precision in pair)
        return self.layers * self.kv_heads * each + POSITION_BYTES
