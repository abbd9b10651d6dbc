"""What a chat template can do to values: filters, tests, methods and operators, each with what it takes counted first.

The tables are positive: what does not stand in them is not there. A filter is in one that says what it takes.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import filters as jinja_filters
from jinja2 import pass_context
from jinja2 import tests as jinja_tests
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from markupsafe import Markup

from kvq.runtime.text.allowance import CHARACTERS_OF_AN_ITEM, CHARACTERS_OF_AN_OBJECT, MOST_BITS, Allowance
from kvq.runtime.text.rewriting import COMPARED, CONCATENATED, COUNTED, HASHED, SHOWN, SLICED, SPENT

FILTERS: dict[str, Any] = {**jinja_filters.FILTERS}
TESTS: dict[str, Any] = {**jinja_tests.TESTS}
# Filters by what they take: nothing that grows; a look at the list; a look at everything in it, text made of it.
FREE = ("attr", "count", "d", "default", "first", "last", "length", "random")
SHALLOW = ("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
DEEP = ("dictsort", "groupby", "max", "min", "sort", "unique")
# Characters made of one, at most, with what is needed on the way.
TEXT = {
    "abs": 1, "capitalize": 3, "e": 6, "escape": 6, "filesizeformat": 1, "float": 1, "forceescape": 6, "int": 1,
    "lower": 3, "round": 1, "safe": 1, "string": 1, "title": 12, "trim": 1, "truncate": 1, "upper": 3, "urlencode": 12,
    "wordcount": 12,
}  # fmt: skip
LOOKING = ("!=", "<", "<=", "==", ">", ">=", "divisibleby", "eq", "equalto", "even", "ge", "greaterthan", "gt", "in",
           "le", "lessthan", "lower", "lt", "ne", "odd", "upper")  # fmt: skip
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gteq": operator.ge, "lt": operator.lt,
    "lteq": operator.le, "in": lambda value, values: value in values,
    "notin": lambda value, values: value not in values,
}  # fmt: skip
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
METHODS: dict[type, set[str]] = {
    str: {*LOOKS, *COPIES, *SPLITS, "join", "replace"},
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    float: {"is_integer"},
    int: {"bit_length", "is_integer"},
}
STEPS_OF_A_FILTER = 15  # jinja2's own work, whatever it is given
MOST_INDENT = 16
MOST_PLACES = 100


def kind_of(value: Any) -> type | None:
    """The type in `METHODS` that a value is of."""
    return next((kind for kind in METHODS if isinstance(value, kind)), None)


class Operations:
    """Everything that takes from one allowance.

    Args:
        allowance: what is left.
    """

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance

    def filters(self) -> dict[str, Any]:
        """By name: what a template may use, and what `rewriting` puts into it."""
        found: dict[str, Any] = {name: self._free(FILTERS[name]) for name in FREE}
        found |= {name: self._shallow(FILTERS[name]) for name in SHALLOW}
        found |= {name: self._deep(FILTERS[name]) for name in DEEP}
        found |= {name: self._text(FILTERS[name], most) for name, most in TEXT.items()}
        own: dict[str, Callable[..., Any]] = {
            "join": self.joined, "replace": self.replaced, "sum": self.sum, "tojson": self.tojson,
        }  # fmt: skip
        own |= {
            COMPARED: self.compared, CONCATENATED: self.joined, COUNTED: self.counted, HASHED: self.hashed,
            SHOWN: self.text, SLICED: self.sliced, SPENT: self.spent,
        }  # fmt: skip
        return found | {name: _of_context(function) for name, function in own.items()}

    def tests(self) -> dict[str, Any]:
        """By name."""
        return {name: self._looking(test) if name in LOOKING else test for name, test in TESTS.items()}

    # -- filters and tests of jinja2 --------------------------------------------------------------

    def _free(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, *given: Any, **named: Any) -> Any:
            self.allowance.step(STEPS_OF_A_FILTER)
            return _called(function, context, *given, **named)

        return pass_context(counted)

    def _shallow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, value: Any, *given: Any, **named: Any) -> Any:
            self._over(value, given, named)
            return _whole(_called(function, context, value, *given, **named))

        return pass_context(counted)

    def _deep(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, value: Any, *given: Any, **named: Any) -> Any:
            self._over(value, given, named)
            weight = self.allowance.weigh(value, *given, *named.values())
            self.allowance.step(8 * weight.items)  # of sorting
            self.allowance.make(weight.characters)
            return _whole(_called(function, context, value, *given, **named))

        return pass_context(counted)

    def _text(self, function: Callable[..., Any], most: int) -> Callable[..., Any]:
        def counted(context: Context, value: Any, *given: Any, **named: Any) -> Any:
            places = [part for part in (*given, *named.values()) if isinstance(part, int)]
            if function is FILTERS["round"] and any(abs(part) > MOST_PLACES for part in places):
                raise SecurityError("it rounds to more places than a number has")
            self.allowance.step(STEPS_OF_A_FILTER)
            weight = self.allowance.weigh(value, *given, *named.values())
            self.allowance.make(most * (weight.characters + 4 * weight.items))
            result = _called(function, context, value, *given, **named)
            self.allowance.weigh(result)
            return result

        return pass_context(counted)

    def _looking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, *values: Any) -> Any:
            self.allowance.step(STEPS_OF_A_FILTER)
            self.allowance.weigh(*values)
            return _called(function, context, *values)

        return pass_context(counted)

    def _over(self, value: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Take what it costs to go through a value, and through a path of attributes at each."""
        names = sum(len(part) for part in (*given, *named.values()) if isinstance(part, str))
        count = len(value) if hasattr(value, "__len__") else 1
        self.allowance.step(count * (10 + names // 2))
        self.allowance.make(CHARACTERS_OF_AN_OBJECT * count)

    # -- what `rewriting` puts in -----------------------------------------------------------------

    def spent(self, count: int, characters: int) -> None:
        """A body that runs takes its steps, and its text."""
        self.allowance.step(count)
        self.allowance.make(characters)

    def counted(self, values: Iterable[Any], each: int) -> Iterator[Any]:
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
            if isinstance(left, str) and isinstance(right, str):
                self.allowance.read(len(left) + len(right))
            elif name in ("in", "notin") and isinstance(right, dict):
                self.hashed(left)
            elif left is not None and right is not None:
                self.allowance.weigh(*(part for part in (left, right) if not isinstance(part, range)))
            result = COMPARISONS[name](left, right)
            if not result:
                break
            left = right
        return result

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        part = slice(start, stop, step)
        if isinstance(value, str | list | tuple):
            count = len(range(*part.indices(len(value))))
            self.allowance.make(count) if isinstance(value, str) else self.allowance.copy(count)
        return value[part]

    def hashed(self, key: Any) -> Any:
        """A key of a dictionary: tuples in tuples take as long to hash as they are large."""
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

    # -- methods ----------------------------------------------------------------------------------

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
        return _whole(getattr(owner, name)(*given, **named))

    def _of_text(self, text: str, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name == "replace" and len(given) > 1:
            return self.replaced(text, *given[:3])
        if name == "join" and given:
            return self.joined(given[0], text)
        self.allowance.weigh(*given, *named.values())
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


def _of_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a filter that is never computed while a template is compiled: there is no allowance then."""

    def called(context: Context, *given: Any, **named: Any) -> Any:
        return function(*given, **named)

    return pass_context(called)


def _called(function: Callable[..., Any], context: Context, *given: Any, **named: Any) -> Any:
    """A function of jinja2's own tables, with what it wants to be passed first."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
    return function(*((first[wanted],) if wanted else ()), *given, **named)


def _whole(value: Any) -> Any:
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
