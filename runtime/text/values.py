"""What a chat template does with values: shows, compares, looks up, joins and searches them, each counted first."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from kvq.runtime.text.allowance import CHARACTERS_OF_AN_OBJECT, Allowance

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gteq": operator.ge, "lt": operator.lt,
    "lteq": operator.le, "in": lambda value, values: value in values,
    "notin": lambda value, values: value not in values,
}  # fmt: skip
MOST_INDENT = 16
STEPS_OF_AN_ITEM = 12
MOST_BITS_OF_A_KEY = 60  # larger integers are hashed by their remainder: many of them alike, as an attacker likes


class Values:
    """What takes from one allowance, whatever it is done by.

    Args:
        allowance: what is left.
    """

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance

    def spent(self, count: int, characters: int) -> None:
        """A body that runs takes its steps, and its text."""
        self.allowance.step(count)
        self.allowance.make(characters)

    def counted(self, values: Iterable[Any], each: int) -> Iterable[Any]:
        """The values of a loop, so many steps each."""
        for value in values:
            self.allowance.step(each)
            yield value

    def text(self, value: Any) -> str:
        """str(), of values whose text has a size that is known."""
        if isinstance(value, str):
            self.allowance.make(len(value))
            return value
        weight = self.allowance.weigh(value)
        self.allowance.make(4 * weight.characters + 4 * weight.items)  # as escapes, with quotes and commas
        return str(value)

    def compared(self, left: Any, *pairs: Any) -> Any:
        """`left op right`, or a chain of them: pairs are op, right, op, right."""
        result: Any = True
        for name, right in zip(pairs[::2], pairs[1::2], strict=True):
            self.allowance.step(5)
            if name in ("in", "notin"):
                self._within(left, right)
            elif isinstance(left, str) and isinstance(right, str):
                self.allowance.read(len(left) + len(right))
            elif left is not None and right is not None:
                self.allowance.weigh(*(part for part in (left, right) if not isinstance(part, range)))
            result = COMPARISONS[name](left, right)
            if not result:
                break
            left = right
        return result

    def _within(self, part: Any, values: Any) -> None:
        """Take what it costs to look for a part in values."""
        if isinstance(part, str) and isinstance(values, str):
            self.allowance.read(len(part) + len(values))
            self.searched(values, part)
        elif isinstance(values, dict):
            self.hashed(part)
        elif isinstance(values, range):
            self.allowance.weigh(part)
            self.allowance.step(1 if isinstance(part, int) else 2 * len(values))  # compared with one after the other
        else:
            self.allowance.weigh(values, *(() if isinstance(part, range) else (part,)))

    def searched(self, text: str, part: Any) -> None:
        """Take what it costs to look for a part of a text, from either end, at worst.

        Python compares the part at every place, up to where it differs. The first of what is alike at two places that
        overlap stands in the part twice: a part in which its first character, or seen from the end its last, stands
        once, is compared with no character of the text twice.
        """
        if not isinstance(part, str) or not 0 < len(part) <= len(text):
            return
        self.allowance.read(len(part))
        alike = max(part.count(part[0]), part.count(part[-1]))
        places = len(text) - len(part) + 1
        self.allowance.read(min(places * len(part), len(text) * (1 + alike)))

    def stripped(self, length: int, characters: Any) -> None:
        """Take what it costs to look so many characters up among some."""
        if isinstance(characters, str):
            self.allowance.read(length * len(characters))

    def number(self, value: Any) -> Any:
        """What is computed with: `%` of a text makes another one."""
        if not isinstance(value, int | float | Undefined):
            raise SecurityError(f"it computes with a {type(value).__name__}")
        self.allowance.weigh(value)
        return value

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        part = slice(start, stop, step)
        if isinstance(value, str | list | tuple):
            count = len(range(*part.indices(len(value))))
            self.allowance.make(count) if isinstance(value, str) else self.allowance.copy(count)
        return value[part]

    def hashed(self, key: Any) -> Any:
        """A key of a dictionary: tuples in tuples take as long to hash as they are large."""
        if isinstance(key, int) and key.bit_length() > MOST_BITS_OF_A_KEY:
            raise SecurityError(f"it uses an integer of more than {MOST_BITS_OF_A_KEY} bits as a key")
        if isinstance(key, str):
            self.allowance.read(len(key))
        elif not isinstance(key, int | float | type(None) | Undefined):
            raise SecurityError(f"it uses a {type(key).__name__} as a key")
        return key

    def joined(self, values: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
        """str.join, the filter of that name, and the operator ~."""
        parts = []
        for value in values:
            self.allowance.step(2)
            parts.append(self.text(value if attribute is None else self.item(value, attribute)))
        separator = self.text(separator)
        self.allowance.make(sum(map(len, parts)) + len(separator) * len(parts))
        return str(separator).join(map(str, parts))

    def item(self, value: Any, path: Any) -> Any:
        """What filters call an attribute: names or numbers between dots."""
        self.allowance.step(len(path) if isinstance(path, str) else 1)
        for part in str(path).split(".") if isinstance(path, str) else [path]:
            self.allowance.step()
            key = int(part) if isinstance(part, str) and part.isdigit() else part
            try:
                value = value[self.hashed(key)]
            except (LookupError, TypeError):
                return Undefined(obj=value, name=str(key))
        return value

    def replaced(self, text: Any, old: Any, new: Any, count: Any = None) -> str:
        """str.replace, and the filter of that name."""
        text, old, new = (str(self.text(part)) for part in (text, old, new))
        self.searched(text, old)
        self.allowance.make(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def sum(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        """The filter of that name, of numbers: sums of lists copy them again and again."""
        parts = [start]
        for value in values:
            self.allowance.step(2)
            parts.append(value if attribute is None else self.item(value, attribute))
        if not all(isinstance(part, int | float) for part in parts):
            raise SecurityError("it sums what are no numbers")
        self.allowance.weigh(parts)
        return sum(parts)

    def unique(self, values: Iterable[Any], case_sensitive: bool = False, attribute: Any = None) -> list[Any]:
        """The filter of that name."""
        seen, found = set(), []
        for value in values:
            self.allowance.step(STEPS_OF_AN_ITEM)
            self.allowance.make(CHARACTERS_OF_AN_OBJECT)
            key = self.hashed(value if attribute is None else self.item(value, attribute))
            if isinstance(key, str) and not case_sensitive:
                self.allowance.make(len(key))
                key = key.lower()
            if key not in seen:
                seen.add(key)
                found.append(value)
        return found

    def tojson(self, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        """JSON without the HTML escapes of jinja2's own filter."""
        widths = [len(indent) if isinstance(indent, str) else indent or 0, *(len(text) for text in separators or ())]
        if not all(isinstance(width, int) and 0 <= width <= MOST_INDENT for width in widths):
            raise SecurityError("it pads text to a large width")
        weight = self.allowance.weigh(value)
        each = sum(widths) + 4 + (widths[0] * weight.depth)
        self.allowance.make((12 if ensure_ascii else 6) * weight.characters + each * weight.items)
        self.allowance.step(8 * weight.items)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
