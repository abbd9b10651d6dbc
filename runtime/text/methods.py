"""Methods and operators of a chat template, each with what it takes counted first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from markupsafe import Markup

from kvq.runtime.text.allowance import CHARACTERS_OF_AN_ITEM, CHARACTERS_OF_AN_OBJECT, MOST_BITS
from kvq.runtime.text.values import Values

# Methods of text by what they take.
LOOKS = {
    "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier",
    "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "rfind", "rindex", "startswith",
}  # fmt: skip
COPIES = {
    "capitalize", "casefold", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rpartition", "rstrip",
    "strip", "swapcase", "title", "upper",
}  # fmt: skip
SPLITS = {"rsplit", "split", "splitlines"}
# Of these, what looks for a text, and what looks each character up in one.
SEARCHES = {"count", "find", "index", "partition", "rfind", "rindex", "rpartition", "rsplit", "split"}
STRIPS = {"lstrip", "rstrip", "strip"}
METHODS: dict[type, set[str]] = {
    str: {*LOOKS, *COPIES, *SPLITS, "join", "replace"},
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    float: {"is_integer"},
    int: {"bit_length", "is_integer"},
}
# What operators are for. Others (namespaces, macros) may say for themselves how they are added to a text.
OPERANDS = (str, list, tuple, dict, range, int, float, complex, type(None), Undefined)


def kind_of(value: Any) -> type | None:
    """The type in `METHODS` that a value is of."""
    return next((kind for kind in METHODS if isinstance(value, kind)), None)


class Methods(Values):
    """Methods, by what they are of, and operators."""

    def method(self, owner: Any, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a method of `METHODS`."""
        kind = kind_of(owner)
        if kind is None or name not in METHODS[kind]:
            raise SecurityError(f"it calls {name} of a {type(owner).__name__}")
        if kind is str:
            return self._of_text(str(owner), name, given, named)
        if kind is dict and name == "get":
            self.hashed(given[0] if given else None)
        elif kind is dict or name == "copy":
            self.allowance.make(CHARACTERS_OF_AN_OBJECT * len(owner))
        else:
            self.allowance.weigh(owner, *given)
        return whole(getattr(owner, name)(*given, **named))

    def _of_text(self, text: str, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name == "replace" and len(given) > 1:
            return self.replaced(text, *given[:3])
        if name == "join" and given:
            return self.joined(given[0], text)
        self.allowance.weigh(*given, *named.values())
        part = given[0] if given else named.get("sep")
        if name in SEARCHES:
            self.searched(text, part)
        elif name in STRIPS:
            self.stripped(len(text), part)
        if name in LOOKS:
            self.allowance.read(len(text))
        elif name in SPLITS:
            self.allowance.make(len(text) + CHARACTERS_OF_AN_OBJECT * _most_parts(text, name, *given, **named))
        else:
            self.allowance.make(len(text) if text.isascii() else 3 * len(text))
        return getattr(text, name)(*given, **named)

    # -- operators --------------------------------------------------------------------------------

    def before(self, sign: str, left: Any, right: Any) -> None:
        """Take what `left sign right` takes."""
        for value in (left, right):
            if not isinstance(value, OPERANDS):
                raise SecurityError(f"it computes with a {type(value).__name__}")
            if isinstance(value, int):
                self.allowance.integer(value)
        if sign == "**":
            if not all(isinstance(value, int | float) and abs(value) < 1000 for value in (left, right)):
                raise SecurityError("it computes a power of large numbers")
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_BITS:
                raise SecurityError(f"it computes with integers of more than {MOST_BITS} bits")
        sizes = [len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)]
        if sign == "*" and sizes != [None, None]:
            once, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            made = (once or 0) * max(0, times) if isinstance(times, int) else 0
            self.allowance.make(8 * made)
        elif sign == "+" and None not in sizes:
            many = 1 if isinstance(left, str) else CHARACTERS_OF_AN_ITEM
            escaped = 6 if isinstance(left, Markup) or isinstance(right, Markup) else 1
            self.allowance.make(many * escaped * sum(size or 0 for size in sizes))
        elif sign == "%" and isinstance(left, str):
            if re.search(r"\d{4}|\*", left):
                raise SecurityError("it pads text to a large width")
            weight = self.allowance.weigh(left, right)
            self.allowance.make(len(left) + left.count("%") * (1000 + 6 * (weight.characters + weight.items)))


def whole(value: Any) -> Any:
    """Lists for what would be computed while it is looked at, and for views, which show all that they are of."""
    if isinstance(value, str | list | tuple | dict | int | float | None | Undefined):
        return value
    return list(value) if isinstance(value, Iterable) else value


def _most_parts(text: str, name: str, separator: Any = None, most: Any = -1, *, sep: Any = None, maxsplit: Any = -1,
                keepends: Any = False) -> int:  # fmt: skip
    """How many parts a text is split into."""
    if name == "splitlines":
        return sum(1 for _ in re.finditer(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", text)) + 1
    separator = sep if separator is None else separator
    found = text.count(separator) if isinstance(separator, str) and separator else None
    count = sum(1 for _ in re.finditer(r"\S+", text)) if found is None else found
    limit = max(maxsplit, most) if isinstance(most, int) and isinstance(maxsplit, int) else -1
    return (min(count, limit) if limit >= 0 else count) + 1
