"""JSON schemas as llguidance is given them: where it is laxer than a validator, with what makes it exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from kvq.runtime.errors import GrammarError

MOST_DEPTH = 64
MOST_PROPERTIES = 2000  # of an object: the work grows with their square
MOST_PATTERNS = 12  # of a schema that joins some: each doubles what llguidance looks through
# llguidance makes a state of each remainder, and where schemas are joined or told apart of each combination of them.
MOST_REMAINDERS = 10_000
JOINING = frozenset(("allOf", "anyOf", "oneOf", "$ref", "not", "if"))
# What says nothing about a value; beside anything else a reference or a choice is joined with it.
NOTES = frozenset(("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
                   "$schema", "$id", "$comment", "$defs", "definitions", "discriminator"))  # fmt: skip
# What stands below these keys is a value, and no schema.
VALUES = ("const", "enum", "default", "example", "examples")
# What stands below these is a schema for each name.
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# RFC 3339. llguidance's own have second 60 in every minute, and 29 February in every year.
FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def held_exactly(schema: Any, depth: int = 0) -> Any:
    """A schema with the same meaning, of which llguidance makes nothing that a validator refuses.

    Args:
        schema: JSON value; not changed.
        depth: of where it stands.

    Raises:
        GrammarError: it nests too deeply, has too many properties, joins too many patterns, or asks for multiples with
            too many remainders.
    """
    if not depth:
        _check_multiples(schema)
        patterns, joins = _joined(schema)
        if joins and patterns > MOST_PATTERNS:
            raise GrammarError(
                f"the schema has {patterns} patterns and formats, at most {MOST_PATTERNS} are taken beside allOf, or a"
                " $ref, anyOf or oneOf with other demands beside it; take some out"
            )
    if depth > MOST_DEPTH:
        raise GrammarError(f"the schema nests deeper than {MOST_DEPTH}; make it flatter")
    if isinstance(schema, list):
        return [held_exactly(part, depth + 1) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "x-guidance":  # llguidance's own switches, which are not the caller's
            continue
        if key in NAMED and isinstance(value, dict):
            if key == "properties" and len(value) > MOST_PROPERTIES:
                raise GrammarError(f"an object has {len(value)} properties, at most {MOST_PROPERTIES} are taken")
            found[key] = {name: held_exactly(part, depth + 2) for name, part in value.items()}
        else:
            found[key] = value if key in VALUES else held_exactly(value, depth + 1)
    pattern = FORMATS.get(found["format"]) if isinstance(found.get("format"), str) else None
    if pattern is not None:
        del found["format"]
        if "pattern" in found:
            others = found.get("allOf", [])
            if not isinstance(others, list):
                raise GrammarError("allOf is no list; give it one")
            found["allOf"] = [*others, {"pattern": pattern}]
        else:
            found["pattern"] = pattern
    return found


def _check_multiples(schema: Any) -> None:
    """Raise GrammarError for too many remainders of `multipleOf`."""
    found, joins = set[int](), False
    for part in _objects(schema):
        joins |= bool(JOINING & part.keys())
        number = part.get("multipleOf")
        if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf:
            found.add(_digits(number))
    if (math.prod(found) if joins else sum(found)) > MOST_REMAINDERS:
        raise GrammarError(
            f"multipleOf asks for more than {MOST_REMAINDERS} remainders to be told apart, counted without factors of 2"
            " and 5; take smaller numbers, or fewer of them beside allOf, anyOf, oneOf or $ref"
        )


def _digits(number: float) -> int:
    """The digits of a decimal number as a whole one, without its factors of 2 and 5, which cost nothing."""
    digits = int("".join(map(str, Decimal(str(number)).as_tuple().digits)))
    for factor in (2, 5):
        while digits % factor == 0:
            digits //= factor
    return digits


def _joined(schema: Any) -> tuple[int, bool]:
    """How many patterns and formats there are in a schema, and whether it joins any schemas."""
    patterns, joins = 0, False
    for part in _objects(schema):
        demands = part.keys() - NOTES
        patterns += len({"pattern", "format"} & demands)
        both = part.get("allOf")
        several = isinstance(both, list) and len(both) > 1
        joins |= several or bool({"allOf", "$ref", "anyOf", "oneOf"} & demands and len(demands) > 1)
    return patterns, joins


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects of a schema that are not values."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            yield part
            todo += [value for key, value in part.items() if key not in VALUES]
