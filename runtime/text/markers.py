"""Added tokens in a text: the longest at each place. A stranger's tokenizer may have tens of thousands of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator


class Markers:
    """Finds texts that are markers, from left to right, none over another.

    One regular expression of them all would be long to compile, and try each at each place; a table is asked here, for
    each length that a marker with such a beginning has.

    Args:
        texts: the markers, none empty.
        guard: a character; a marker that it stands behind is none.
    """

    def __init__(self, texts: Collection[str], guard: str) -> None:
        self._texts, self._guard = frozenset(texts), guard
        lengths: dict[str, set[int]] = defaultdict(set)
        for text in self._texts:
            lengths[text[0]].add(len(text))
        self._lengths = {first: sorted(each, reverse=True) for first, each in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, self._lengths))}]" if lengths else r"(?!)")

    def found(self, text: str) -> Iterator[tuple[int, str]]:
        """Place and text of each."""
        at = 0
        while first := self._first.search(text, at):
            begin = first.start()
            marker = self._at(text, begin)
            if marker:
                yield begin, marker
            at = begin + max(1, len(marker))

    def _at(self, text: str, begin: int) -> str:
        """The longest that begins there; empty if none does."""
        for length in self._lengths[text[begin]]:
            piece = text[begin : begin + length]
            if piece in self._texts and not text.startswith(self._guard, begin + length):
                return piece
        return ""

    def split(self, text: str) -> list[str]:
        """Ordinary text and markers in turn, beginning and ending with ordinary text, which may be empty."""
        pieces, end = [], 0
        for begin, marker in self.found(text):
            pieces += [text[end:begin], marker]
            end = begin + len(marker)
        return [*pieces, text[end:]]

    def replaced(self, text: str, by: Callable[[str], str]) -> str:
        """The text with something else for every marker."""
        return "".join(by(piece) if at % 2 else piece for at, piece in enumerate(self.split(text)))
