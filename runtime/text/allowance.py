"""What a rendering may take: steps of work and characters of text, taken before the work is done or the text made."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

# A step is an expression of a template: 0.1 to 0.3 microseconds. Published templates take some hundred for a message,
# and up to 90 for a value in the description of a tool.
MOST_STEPS = 500_000
STEPS_OF_A_MESSAGE = 5_000
STEPS_OF_AN_ITEM, MOST_ITEMS = 200, 20_000  # of what the caller brings; 64 tools of 20 parameters are 17,000
# A character is one made, eight read, or a reference: at most eight bytes.
MOST_CHARACTERS = 1 << 22  # and some times what the messages hold
CHARACTERS_OF_A_CHARACTER = 32  # a template with reasoning splits, strips and joins a reply a dozen times
CHARACTERS_OF_AN_ITEM = 1  # of a list, whose items are there already
CHARACTERS_OF_AN_OBJECT = 16  # one that is made anew
MOST_DEPTH = 64
MOST_BITS = 1100  # of integers: as many as floats reach
NUMBERS_AND_NOTHING = (float, type(None), Undefined)


class Weight:
    """How large a value is, with everything in it, as often as it stands there.

    Attributes:
        characters: of all text, and of numbers as text.
        items: values in lists, tuples and dictionaries.
        depth: of the nesting.
    """

    __slots__ = ("characters", "depth", "items")

    def __init__(self) -> None:
        self.characters = self.items = self.depth = 0


class Allowance(threading.local):
    """What is left of the bounds in the rendering that this thread is at."""

    steps = 0
    characters = 0

    def begin(self, messages: Any, *others: Any) -> None:
        """Bounds for a rendering of these messages; others: values of the caller's that are rendered with them."""
        self.steps, self.characters = 1 << 62, 1 << 62  # what the caller brings is the caller's own
        weight = self.weigh(messages, *others)
        count = len(messages) if hasattr(messages, "__len__") else 0
        self.steps = MOST_STEPS + STEPS_OF_A_MESSAGE * count + STEPS_OF_AN_ITEM * min(weight.items, MOST_ITEMS)
        self.characters = MOST_CHARACTERS + CHARACTERS_OF_A_CHARACTER * (weight.characters + weight.items)

    def step(self, count: int = 1) -> None:
        """Take steps from what is left."""
        self.steps -= _amount(count)
        if self.steps < 0:
            raise SecurityError("it takes more steps than its messages account for")

    def make(self, characters: int) -> None:
        """Take the characters of a text that is about to be made."""
        self.characters -= _amount(characters)
        if self.characters < 0:
            raise SecurityError("it makes more text than its messages account for")

    def read(self, characters: int) -> None:
        """Take what it costs to look at so many characters."""
        self.characters -= _amount(characters) >> 3
        if self.characters < 0:
            raise SecurityError("it reads more text than its messages account for")

    def copy(self, items: int) -> None:
        """Take a list of so many items that are there already."""
        self.make(CHARACTERS_OF_AN_ITEM * _amount(items))

    def weigh(self, *values: Any) -> Weight:
        """How large values are; each one that is looked at is taken from what is left.

        A list may hold another one many times, and that a third one: as text it has no end. So nothing looks at all
        of a value that has not been weighed.
        """
        found = Weight()
        waiting = [(value, 0) for value in values]
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, str):
                found.characters += len(value)
                self.read(len(value))
                continue
            if isinstance(value, int):
                self.integer(value)
                found.characters += 8 + value.bit_length() // 3
                continue
            if isinstance(value, NUMBERS_AND_NOTHING):
                found.characters += 32
                continue
            parts = _parts(value)
            if depth >= MOST_DEPTH:
                raise SecurityError(f"it nests lists deeper than {MOST_DEPTH}")
            count = len(value) * (2 if isinstance(value, dict) else 1)
            self.step(8 + 3 * count)
            found.items += count
            found.depth = max(found.depth, depth + 1)
            waiting += [(part, depth + 1) for part in parts]
        return found

    def integer(self, value: int) -> None:
        """Refuse an integer that is larger than any number has a use for."""
        if value.bit_length() > MOST_BITS:
            raise SecurityError(f"it computes with integers of more than {MOST_BITS} bits")


def _amount(count: Any) -> int:
    """What can be taken: nothing is ever given back."""
    if type(count) is not int or count < 0:
        raise SecurityError("it takes what cannot be counted")
    return count


def _parts(value: Any) -> Iterable[Any]:
    """What a value holds."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return value
    raise SecurityError(f"it looks into a {type(value).__name__}")  # whose text may be as large as what it holds
