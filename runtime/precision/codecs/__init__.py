"""Codecs by the id of their precision. A new precision is one new module here with a ``CODECS`` dict."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from kvq.runtime.discovery import discover
from kvq.runtime.precision.codecs.base import Codec
from kvq.runtime.precision.codecs.uniform import WINDOWS
from kvq.runtime.precision.key_turns import KeyTurns
from kvq.runtime.precision.precision import MOST_ID, OPEN


def _checked(codecs: dict[int, Codec]) -> dict[int, Codec]:
    """Codecs by id, as they are; RuntimeError where ids or names would be taken for one another."""
    precisions = [WINDOWS[16].precision, *(codec.precision for codec in codecs.values())]
    for identity in ("id", "name"):
        found = [getattr(precision, identity) for precision in precisions]
        if len(set(found)) < len(found):
            raise RuntimeError(f"two precisions have one {identity}: {found}")
    for id_, codec in codecs.items():
        if id_ != codec.precision.id or not OPEN < id_ <= MOST_ID:
            raise RuntimeError(f"{codec.precision} is offered as {id_}; ids are 1 to {MOST_ID}")
    return codecs


CODECS: dict[int, Codec] = _checked(discover(sys.modules[__name__], "CODECS"))


class CodecSet(NamedTuple):
    """The codecs a store encodes with; every set gives the same bytes.

    by_id: id of a precision -> codec.
    windows: bits at which the recent window keeps its tokens, 8 or 16 -> its codec.
    mover: takes tokens through the window in a single call, or None; see `kvq.runtime.kv.moves.Mover`.
    feedback: of keys, see `Codec.encode`: float16 [layers, kv_heads, head_dim, head_dim], C-contiguous, or None.
    turns: what keys of few bits are stored less, or None.
    """

    by_id: dict[int, Codec]
    windows: dict[int, Codec]
    mover: Any = None
    feedback: np.ndarray | None = None
    turns: KeyTurns | None = None

    def turns_of(self, precision: int) -> KeyTurns | None:
        """What keys of a precision are stored less; None where they are stored as they are."""
        return self.turns if self.turns is not None and self.turns.takes(self.by_id[precision].bits) else None

    def stored(
        self,
        precision: int,
        x: np.ndarray,
        keys: bool,
        positions: np.ndarray,
        layers: slice | list[int] = slice(None),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of vectors [layers, kv_heads, tokens, head_dim] at positions [tokens], behind the window;
        layers: which.
        """
        if keys and (turns := self.turns_of(precision)) is not None:
            x = x - turns.of(positions)[layers]
        feedback = self.feedback[layers] if keys and self.feedback is not None else None
        return self.by_id[precision].encode(x, feedback)

    def reread(self, precision: int, x: np.ndarray, layer: int | None, positions: np.ndarray) -> np.ndarray:
        """What readers see of vectors [..., kv_heads, tokens, head_dim] that left it; layer: of keys, None: values."""
        codec = self.by_id[precision]
        if layer is None:
            return codec.roundtrip(x)
        feedback = None if self.feedback is None else self.feedback[layer]
        if (turns := self.turns_of(precision)) is None:
            return codec.roundtrip(x, feedback)
        turned = turns.of(positions, layer)
        return codec.roundtrip(x - turned, feedback) + turned


NUMPY = CodecSet(CODECS, WINDOWS)

__all__ = ["CODECS", "NUMPY", "Codec", "CodecSet"]
