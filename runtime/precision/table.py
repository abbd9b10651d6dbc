"""The table of what is stored: pairs of precisions, the shape of a token, and every formula for its bytes."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

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
    """What fixes the size of every stored token.

    windows: of each layer how many of the newest tokens it sees, 0: all; empty: all layers see all.
    profiles: pairs that have precisions of their own in every layer, and which: a token's pair is then the name of a
        class. All other pairs mean the same in every layer.
    """

    layers: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = ()
    profiles: tuple[tuple[Pair, tuple[Pair, ...]], ...] = ()

    @property
    def window(self) -> int:
        """Tokens that the layers with a window see at most; 0 without such."""
        return max(self.windows, default=0)

    @property
    def wide(self) -> list[int]:
        """Layers that see all tokens."""
        return [i for i in range(self.layers) if not self.windows or not self.windows[i]]

    @property
    def narrow(self) -> Geometry:
        """Of tokens that only these layers see."""
        wide = self.wide
        profiles = tuple((pair, tuple(by_layer[i] for i in wide)) for pair, by_layer in self.profiles)
        return Geometry(len(wide), self.kv_heads, self.head_dim, profiles=profiles)

    def by_layer(self, pair: tuple[int, int]) -> tuple[Pair, ...]:
        """What tokens of a pair are stored at in every layer."""
        return self._profile(pair) or (Pair(*pair),) * self.layers

    def _profile(self, pair: tuple[int, int]) -> tuple[Pair, ...]:
        """`by_layer` of a pair that has precisions of its own there; else empty."""
        return dict(self.profiles).get(Pair(*pair), ())

    def precisions(self, pair: tuple[int, int]) -> set[int]:
        """Ids of what tokens of a pair are stored at in some layer."""
        return {precision for of_layer in self.by_layer(pair) for precision in of_layer} if self.profiles else set(pair)

    def in_layer(self, chosen: np.ndarray, layer: int) -> np.ndarray:
        """What tokens of pairs uint8 [tokens, 2] are stored at in a layer: uint8 [tokens, 2]."""
        found = chosen
        for pair, by_layer in self.profiles:
            if (own := (chosen == pair).all(-1)).any():
                found = np.where(own[:, None], np.array(by_layer[layer], np.uint8), found)
        return found

    @property
    def values(self) -> int:
        """Numbers that a token holds, keys and values of all layers: what bits per value are counted by."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def window_token_bytes(self, bits: int) -> int:
        """Bytes of a token in the recent window of so many bits: codes, scales and its choice."""
        return 2 * self.layers * self.kv_heads * NUMPY.windows[bits].vector_bytes(self.head_dim) + CHOICE_BYTES

    def token_bytes(self, pair: tuple[int, int]) -> int:
        """Bytes of a token in a page: codes and scales of all layers and heads, and its position."""
        # Of pairs that are the same in all layers without going through them: a stranger's header may say there are
        # billions.
        own = self._profile(pair)
        sides = [precision for of_layer in own or (pair,) for precision in of_layer]
        each = sum(CODECS[precision].vector_bytes(self.head_dim) for precision in sides) * (1 if own else self.layers)
        return self.kv_heads * each + POSITION_BYTES
