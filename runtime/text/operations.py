"""The filters and tests of a chat template, each with what it takes counted first.

The tables are positive: what does not stand in them is not there. A filter is in one that says what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import filters as jinja_filters
from jinja2 import pass_context
from jinja2 import tests as jinja_tests
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context

from kvq.runtime.text.allowance import CHARACTERS_OF_AN_OBJECT
from kvq.runtime.text.methods import Methods, whole
from kvq.runtime.text.rewriting import COMPARED, CONCATENATED, COUNTED, HASHED, SHOWN, SLICED, SPENT

FILTERS: dict[str, Any] = {**jinja_filters.FILTERS}
TESTS: dict[str, Any] = {**jinja_tests.TESTS}
# Filters by what they take: nothing that grows; a look at the list; a look at everything in it, text made of it.
FREE = ("attr", "count", "d", "default", "first", "last", "length", "random")
SHALLOW = ("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
DEEP = ("dictsort", "groupby", "max", "min", "sort")
# Characters made of one, at most, with what is needed on the way.
TEXT = {
    "abs": 1, "capitalize": 3, "e": 6, "escape": 6, "filesizeformat": 1, "float": 1, "forceescape": 6, "int": 1,
    "lower": 3, "round": 1, "safe": 1, "string": 1, "title": 12, "trim": 1, "truncate": 1, "upper": 3, "urlencode": 12,
    "wordcount": 12,
}  # fmt: skip
# Tests by what they take: a look at the outside of a value; a comparison; a number; text; the hash of a name.
OUTSIDE = ("boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping", "none",
           "number", "sameas", "sequence", "string", "true", "undefined")  # fmt: skip
COMPARING = {
    "!=": "ne", "<": "lt", "<=": "lteq", "==": "eq", ">": "gt", ">=": "gteq", "eq": "eq", "equalto": "eq", "ge": "gteq",
    "greaterthan": "gt", "gt": "gt", "in": "in", "le": "lteq", "lessthan": "lt", "lt": "lt", "ne": "ne",
}  # fmt: skip
OF_NUMBERS = ("divisibleby", "even", "odd")
OF_TEXT = ("lower", "upper")
OF_NAMES = ("filter", "test")
STEPS_OF_A_FILTER = 15  # jinja2's own work, whatever it is given
MOST_PLACES = 100


class Operations(Methods):
    """Everything that takes from one allowance."""

    def filters(self) -> dict[str, Any]:
        """By name: what a template may use, and what `rewriting` puts into it."""
        found: dict[str, Any] = {name: self._free(FILTERS[name]) for name in FREE}
        found |= {name: self._shallow(FILTERS[name]) for name in SHALLOW}
        found |= {name: self._deep(FILTERS[name]) for name in DEEP}
        found |= {name: self._text(FILTERS[name], most) for name, most in TEXT.items()}
        own: dict[str, Callable[..., Any]] = {
            "join": self.joined, "replace": self.replaced, "sum": self.sum, "tojson": self.tojson,
            "unique": self.unique,
        }  # fmt: skip
        own |= {
            COMPARED: self.compared, CONCATENATED: self.joined, COUNTED: self.counted, HASHED: self.hashed,
            SHOWN: self.text, SLICED: self.sliced, SPENT: self.spent,
        }  # fmt: skip
        return found | {name: _of_context(function) for name, function in own.items()}

    def tests(self) -> dict[str, Any]:
        """By name."""
        found: dict[str, Any] = {name: TESTS[name] for name in OUTSIDE}
        found |= {name: self._comparing(sign) for name, sign in COMPARING.items()}
        found |= {name: self._looking(TESTS[name], self.number) for name in OF_NUMBERS}
        found |= {name: self._looking(TESTS[name], self.text) for name in OF_TEXT}
        return found | {name: self._looking(TESTS[name], self.hashed) for name in OF_NAMES}

    # -- filters and tests of jinja2 --------------------------------------------------------------

    def _free(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, *given: Any, **named: Any) -> Any:
            self.allowance.step(STEPS_OF_A_FILTER)
            if function is FILTERS["attr"]:  # whose name is looked up
                for name in (*given[1:], *named.values()):
                    self.hashed(name)
            return _called(function, context, *given, **named)

        return pass_context(counted)

    def _shallow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, value: Any, *given: Any, **named: Any) -> Any:
            self._over(value, given, named)
            return whole(_called(function, context, value, *given, **named))

        return pass_context(counted)

    def _deep(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(context: Context, value: Any, *given: Any, **named: Any) -> Any:
            self._over(value, given, named)
            weight = self.allowance.weigh(value, *given, *named.values())
            self.allowance.step(8 * weight.items)  # of sorting
            self.allowance.make(weight.characters)
            return whole(_called(function, context, value, *given, **named))

        return pass_context(counted)

    def _text(self, function: Callable[..., Any], most: int) -> Callable[..., Any]:
        def counted(context: Context, value: Any, *given: Any, **named: Any) -> Any:
            places = [part for part in (*given, *named.values()) if isinstance(part, int)]
            if function is FILTERS["round"]:
                self.number(value)  # a text times ten to its places is no number, but long
                if any(abs(part) > MOST_PLACES for part in places):
                    raise SecurityError("it rounds to more places than a number has")
            self.allowance.step(STEPS_OF_A_FILTER)
            weight = self.allowance.weigh(value, *given, *named.values())
            self.allowance.make(most * (weight.characters + 4 * weight.items))
            if function is FILTERS["trim"]:
                for part in (*given, *named.values()):
                    self.stripped(most * (weight.characters + 4 * weight.items), part)
            result = _called(function, context, value, *given, **named)
            self.allowance.weigh(result)
            return result

        return pass_context(counted)

    def _comparing(self, sign: str) -> Callable[..., Any]:
        def counted(context: Context, value: Any, other: Any) -> Any:
            self.allowance.step(STEPS_OF_A_FILTER)
            return self.compared(value, sign, other)

        return pass_context(counted)

    def _looking(self, function: Callable[..., Any], as_what: Callable[[Any], Any]) -> Callable[..., Any]:
        def counted(context: Context, *values: Any) -> Any:
            self.allowance.step(STEPS_OF_A_FILTER)
            return _called(function, context, *map(as_what, values))

        return pass_context(counted)

    def _over(self, value: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Take what it costs to go through a value, and through a path of attributes at each."""
        names = sum(len(part) for part in (*given, *named.values()) if isinstance(part, str))
        count = len(value) if hasattr(value, "__len__") else 1
        self.allowance.step(count * (10 + names))
        self.allowance.make(CHARACTERS_OF_AN_OBJECT * count)


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
