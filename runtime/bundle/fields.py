"""kvq.json as Python values: JSON without its loose ends, and fields of one type within bounds each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from kvq.runtime.bundle import limits

# One path component: no separators, no leading dot, so neither ".." nor an absolute path.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


def parse(text: str) -> Any:
    """JSON in which no key comes twice, and every number and text is within bounds.

    Raises:
        ValueError, RecursionError: it is not.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_int=_integer, parse_float=_real)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r:.60} comes twice")
            seen.add(name)
    for text in (*found, *(value for value in found.values() if isinstance(value, str))):
        if len(text) > limits.TEXT or not encodable(text):
            raise ValueError(f"text {text!r:.60} is too long, or no text")
    return found


def encodable(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which JSON can name and UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > limits.NUMBER:
        raise ValueError(f"number {text:.40} is too large")
    return number


def _real(text: str) -> float:
    number = float(text)
    if len(text) > 64 or not math.isfinite(number):
        raise ValueError(f"number {text:.40} is too large, or too long")
    return number


def integer(value: Any, what: str, least: int, most: int) -> int:
    """An int, which True is not, within bounds.

    Raises:
        ValueError: anything else; as for all of these, `what` names it.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def number(value: Any, what: str, most: float) -> float:
    """An int or a float of a magnitude up to `most`."""
    if type(value) not in (int, float) or not abs(value) <= most:
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def text(value: Any, what: str, most: int = limits.NAME, printable: bool = True) -> str:
    """A text of some characters, which can be shown in a terminal unless it need not be."""
    if type(value) is not str or len(value) > most or not encodable(value) or (printable and not value.isprintable()):
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def sequence(value: Any, what: str, most: int) -> list[Any]:
    """A list of so many entries at most."""
    if type(value) is not list or len(value) > most:
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def mapping(value: Any, what: str, most: int) -> dict[str, Any]:
    """An object of so many entries at most."""
    if type(value) is not dict or len(value) > most:
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def named(value: Any, what: str, most: int) -> dict[str, Any]:
    """An object of so many entries at most, with names that can be shown."""
    for name in mapping(value, what, most):
        text(name, f"a name in {what}")
    return value


def scalars(value: Any, what: str, most: int = 64, printable: bool = True) -> dict[str, Any]:
    """An object of texts, numbers, truths and nothings."""
    for name, entry in named(value, what, most).items():
        if type(entry) is str:
            text(entry, f"{name} of {what}", limits.TEXT, printable)
        elif entry is not None and type(entry) not in (int, float, bool):
            raise ValueError(f"{name} of {what} is {entry!r:.60}")
    return value


def file_names(values: Iterable[Any], files: dict[str, Any]) -> None:
    """Texts that name a listed file each, none twice.

    Raises:
        ValueError: one is none, or not listed, or comes twice.
    """
    seen: set[str] = set()
    for value in values:
        name = text(value, "a file name")
        if name not in files:
            raise ValueError(f"{name} is not in the file list")
        if name in seen:
            raise ValueError(f"{name} is named twice")
        seen.add(name)
