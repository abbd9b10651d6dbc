"""Drafts from the text itself: where its last tokens stood before, and what came after them there."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 2  # tokens that have to agree, at least
LONGEST = 12  # agreeing tokens that are counted: who agrees in so many is as good as any other
PLACES = 8  # earlier places that are looked at, the newest first: what a text repeats most, it repeats near


class Lookup:
    """The places of all n-grams of a growing text, at a constant price a token (prompt lookup, Saxena 2023).

    Of the `PLACES` newest earlier places of the last `NGRAM` tokens it takes the one before which most tokens agree,
    `LONGEST` counted at most, and of equal ones the newest.

    Attributes:
        tokens: ids of the text.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}  # n-gram -> where the token behind it stands
        self._before: list[int] = []  # by that place: the next older one of the same n-gram, -1 for none

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the text in."""
        text, newest, before = self.tokens, self._newest, self._before
        for token in tokens:
            text.append(token)
            end = len(text)
            if end < NGRAM:
                before.append(-1)
                continue
            gram = tuple(text[-NGRAM:])
            before.append(newest.get(gram, -1))
            newest[gram] = end

    def find(self) -> tuple[int, int]:
        """Where the tokens stand that may come next, and how many before them agree; (0, 0) where there are none."""
        text = self.tokens
        end = len(text)
        place, best, agreeing = self._before[-1] if text else -1, 0, 0
        for _ in range(PLACES):
            if place < 0:
                break
            same = NGRAM
            while same < LONGEST and same < place and text[place - same - 1] == text[end - same - 1]:
                same += 1
            if same > agreeing:
                best, agreeing = place, same
                if same == LONGEST:
                    break
            place = self._before[place - 1]
        return best, agreeing

    def drafts(self, place: int, most: int) -> list[int]:
        """The tokens from a place on; where the text ends it goes on from there again, as a text that repeats does."""
        text = self.tokens
        found = text[place : place + most]
        period = len(text) - place
        while len(found) < most:
            found.append(found[len(found) - period])
        return found
