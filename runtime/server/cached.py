"""What a text's cache holds while it is generated: its cells with their bits, told as they change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvq.runtime.inspect.views.palette import lowest
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.precision.table import Pair
from kvq.runtime.text.cells import cells
from kvq.runtime.text.decoder import FOLLOWED

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass
class _Told:
    """Of a choice: length of its prompt; where each cell told begins; tokens told that had left the window; how often
    the context had made room.
    """

    prompt: int
    starts: list[int] = field(default_factory=list)
    settled: int = 0
    shifts: int = 0


class CacheReader:
    """Says of each choice of a job which cells were added or have changed since the last time."""

    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}

    def __call__(self, number: int, session: Session) -> dict[str, Any]:
        """The object `cache` of a response; see docs/server.md.

        Args:
            number: of the choice.
            session: its session, after a token was drawn: that one is not cached yet.
        """
        shifts = session.shifts
        told = self._told.setdefault(number, _Told(len(session.tokens), shifts=shifts.times))
        if told.shifts != shifts.times:  # all others in other places
            told = self._told[number] = _Told(shifts.begun, shifts=shifts.times)
        store, stored = session.store, stored_tokens(session.store)
        # What was in the window may have left it, or be due for other bits; the last cell may have become longer.
        starts = told.starts
        while starts and starts[-1] > told.settled:
            starts.pop()
        begin = starts.pop() if starts else 0
        before = session.tokens[max(0, begin - FOLLOWED) : begin]
        found: list[list[Any]] = []
        for cell in cells(session.model.optional_tokenizer, session.tokens[begin:], before):
            first = begin + cell.first
            last = first + cell.length
            bits = lowest(Pair(*row) for row in stored.chosen[first:last].tolist())
            found.append([cell.text, cell.length, str(bits), bool(stored.in_window[last - 1])])
            starts.append(first)
        told.settled = store.bucketed
        values = store.geometry.values * store.length
        return {
            "prompt_tokens": told.prompt,
            "tokens": store.length,
            "nbytes": store.nbytes,
            "kv_bits": 8 * store.used_nbytes / values if values else None,
            "from": begin,
            "cells": found,
        }


def merged(known: list[list[Any]], update: dict[str, Any]) -> list[list[Any]]:
    """The cells of a whole cache after an update of `CacheReader`; known: those before it."""
    at = kept = 0
    while kept < len(known) and at < update["from"]:
        at += known[kept][1]
        kept += 1
    return known[:kept] + update["cells"]
