"""Added tokens in a text: the longest at each place. A stranger's tokenizer may have tens of thousands of them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator


class Markers:
    """Finds texts that are markers, from left to right, none over another.

    One regular expression of them all would be long to compile, and try each at each place; a sorted list is asked.
    What stands right before a text in it begins with the longest marker that the text begins with, if there is one.

    Args:
        texts: the markers, none empty.
        guard: a character; a marker that it stands behind is none.
    """

    def __init__(self, texts: Collection[str], guard: str) -> None:
        self._guard, self._sorted = guard, sorted(set(texts))
        self._longest = max(map(len, self._sorted), default=0)
        self._within: dict[str, str] = {}  # marker -> the longest other one that it begins with
        open_ones: list[str] = [""]
        for text in self._sorted:
            while not text.startswith(open_ones[-1]):
                open_ones.pop()
            self._within[text] = open_ones[-1]
            open_ones.append(text)
        first = "".join(re.escape(each) for each in dict.fromkeys(text[0] for text in self._sorted))
        self._first = re.compile(f"[{first}]" if first else r"(?!)")

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
        place = bisect_right(self._sorted, text[begin : begin + self._longest])
        marker = self._sorted[place - 1] if place else ""
        while marker and not (text.startswith(marker, begin) and not text.startswith(self._guard, begin + len(marker))):
            marker = self._within[marker]
        return marker

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
