"""The fields of a JSON object from a client, taken one by one and checked; what nobody took is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kvq.runtime.errors import RequestError

MOST_NUMBER = 1e300
MOST_NESTED = 256  # lists and objects in one another: what is echoed has to be written as JSON again


def parse_json(body: bytes, echoed: bool = True) -> dict[str, Any]:
    """The body as a JSON object.

    echoed: parts of it may be sent back, so it must be JSON again when it is written: no number that is infinite, and
        no deeper nesting than any stack has room for.

    Raises:
        RequestError: it is none.
    """

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    def finite(text: str) -> float:
        number = float(text)
        if echoed and not math.isfinite(number):
            raise ValueError(f"{text:.40} is more than a number can be")
        return number

    try:
        value = json.loads(body.decode(), parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the body is not JSON ({error!s:.100}); send an object as the API's documents describe"
        ) from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    if echoed and nested_deeper(value, MOST_NESTED):
        raise RequestError(f"the body nests deeper than {MOST_NESTED} lists and objects; make it flatter")
    return value


def nested_deeper(value: Any, most: int) -> bool:
    """Whether a JSON value has more lists and objects in one another than `most`."""
    level = [value]
    for _ in range(most + 1):
        held = [each for each in level if isinstance(each, list | dict)]
        level = [part for each in held for part in (each.values() if isinstance(each, dict) else each)]
        if not held:
            return False
    return True


class Fields:
    """The fields of an object; `done` refuses those that nobody took.

    Args:
        values: the object.
        prefix: of the names in messages.
    """

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self.values = dict(values)
        self.prefix = prefix

    def take(self, *names: str) -> Any:
        """The value of the first of these names that has one; None if none has, or only null."""
        found = [value for name in names if (value := self.values.pop(name, None)) is not None]
        return found[0] if found else None

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise RequestError about a field."""
        raise RequestError(f"{self.prefix}{name} {why}", param=self.prefix + name)

    def typed(self, names: Sequence[str], what: str, fits: Callable[[Any], bool]) -> Any:
        """The value under the first of some names, which has to fit."""
        value = self.take(*names)
        if value is not None and not fits(value):
            self.refuse(names[0], f"must be {what}")
        return value

    def boolean(self, *names: str) -> bool | None:
        """True or false; None where there is none."""
        return self.typed(names, "true or false", lambda value: isinstance(value, bool))

    def text(self, *names: str) -> str | None:
        """A string."""
        return self.typed(names, "a string", lambda value: isinstance(value, str))

    def integer(self, *names: str, least: int, most: int | None = None) -> int | None:
        """An integer within bounds; 5.0 is one."""
        what = "an integer" + (f" of at least {least}" if least > -(1 << 53) else "")
        what += "" if most is None else f" and at most {most}"
        value = self.take(*names)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if value is not None and not (is_integer(value) and least <= value and (most is None or value <= most)):
            self.refuse(names[0], f"must be {what}")
        return value

    def number(self, *names: str) -> float | None:
        """A number."""
        # 1 and 400 zeros is an integer in JSON, and 1e400 infinity.
        value = self.typed(names, f"a number below {MOST_NUMBER:g}", is_number)
        return None if value is None else float(value)

    def object(self, *names: str) -> dict[str, Any] | None:
        """An object."""
        return self.typed(names, "an object", lambda value: isinstance(value, dict))

    def neutral(self, values: dict[str, tuple[Any, ...]]) -> None:
        """Take fields that are not implemented; their value has to be one that asks for nothing, or null."""
        for name, nothing in values.items():
            value = self.take(name)
            if value is not None and not any(same(value, each) for each in nothing):
                self.refuse(name, "is not supported; leave it out")

    def done(self) -> None:
        """Refuse what is left, but for nulls, which ask for nothing."""
        for name in (name for name, value in self.values.items() if value is not None):
            raise RequestError(f"unknown field {self.prefix + name!r:.80}; leave it out", param=self.prefix + name)


def same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal: true is no 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST_NUMBER < value < MOST_NUMBER


def is_integer(value: Any) -> bool:
    """Whether a JSON value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)
