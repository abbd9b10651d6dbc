"""What native code is given of keys that turn with their position, see `kvq.runtime.precision.key_turns`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from kvq.runtime.kv.moves import Move
from kvq.runtime.kv.pages import Page
from kvq.runtime.native.library import Moves, Turns
from kvq.runtime.precision.codecs import CodecSet
from kvq.runtime.precision.key_turns import BLOCK, KeyTurns


class TurnsTable:
    """`Turns` of a store's codecs, kept up to date as the text grows."""

    def __init__(self) -> None:
        self._turns: KeyTurns | None = None
        self._waves = np.zeros((0, 0, 0), np.float32)
        self._given = Turns()

    def address(self, turns: KeyTurns | None, tokens: int) -> int | None:
        """Of a `Turns` for a text of so many tokens, valid until the next call; None where nothing turns."""
        if turns is None:
            return None
        if turns is not self._turns or self._waves.shape[2] * BLOCK < tokens:
            self._turns, self._waves = turns, turns.waves(tokens)  # kept: `given` knows addresses only
            arrays = (turns.vectors, turns.across, self._waves, turns.which)
            self._given = Turns(*(x.ctypes.data for x in arrays), *self._waves.shape)
        return ctypes.addressof(self._given)


class MovedTurns:
    """What the keys are stored less that some moves put into pages, in a `Moves`."""

    def __init__(self) -> None:
        self._turns: KeyTurns | None = None
        self._blocks = (0, 0)
        self._turned = np.zeros(0, np.float32)

    def write(self, to: Moves, codecs: CodecSet, moves: Sequence[Move]) -> None:
        """Have `to` point at it; valid until the next call."""
        turns = codecs.turns
        pages = {id(page): page for _, page, _ in moves if page is not None and turns is not None}
        turned = {id_ for id_, page in pages.items() if any(map(codecs.turns_of, _key_precisions(page)))}
        places = [int(page.positions[slot]) for _, page, slot in moves if page is not None and id(page) in turned]
        if turns is None or not places:
            to.turned, to.first_block, to.turn_blocks = None, 0, 0
            return
        blocks = (min(places) // BLOCK, max(places) // BLOCK + 1)
        if turns is not self._turns or blocks != self._blocks:
            each = [turns.at(block) for block in range(*blocks)]
            self._turns, self._blocks, self._turned = turns, blocks, np.ascontiguousarray(np.stack(each, axis=2))
        to.turned, to.first_block, to.turn_blocks = self._turned.ctypes.data, blocks[0], blocks[1] - blocks[0]


def _key_precisions(page: Page) -> set[int]:
    return {of_layer.k for of_layer in page.geometry.by_layer(page.pair)}
