"""Keywords that a public function does not take become a named error, with the one that was meant; what values are."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar, get_type_hints

import numpy as np

from kvq.runtime.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it counts something: true and false do not, nor do seconds, which numpy takes for whole numbers.

    Calculate with `int` of it: numpy's own are of few bits, and of the unsigned ones -16 is 240.
    """
    return isinstance(value, Integral) and not isinstance(value, bool | np.timedelta64)


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a number that is none of complex ones, true, false, or seconds; see `real`."""
    return isinstance(value, Real) and not isinstance(value, bool | np.timedelta64)


def real(value: Any) -> float:
    """What `is_real` as a float: infinite beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def listed(value: object) -> list[Any] | None:
    """What it has in it; None if it is none of several, as arrays without a dimension are not, or bytes."""
    try:
        return None if isinstance(value, bytes | bytearray | memoryview) else list(value)  # type: ignore[call-overload]
    except TypeError:
        return None


def check_keywords(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raise OptionError for the first of the names given that is not a known one."""
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.6)
            remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
            raise OptionError(f"{function} takes no {name:.60}; {remedy}")


def named_keywords(*options: type) -> Callable[[F], F]:
    """A decorator: unknown keywords raise OptionError, and the signature lists those of `**options` one by one.

    Args:
        *options: TypedDicts of the keywords that the function takes as `**options`.
    """
    rest = [name for each in options for name in get_type_hints(each)]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        own = [p for p in signature.parameters.values() if p.kind != kinds.VAR_KEYWORD]
        more = [kinds(name, kinds.KEYWORD_ONLY, default=...) for name in rest if name not in signature.parameters]
        known = [p.name for p in own if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        known = [name for name in known if name != "self"] + [parameter.name for parameter in more]

        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            if not named.keys() <= set(known):
                check_keywords(named, known, function.__name__)
            return function(*arguments, **named)

        checked.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate
