"""JSON schemas as llguidance is given them: where it is laxer than a validator, with what makes it exact."""

from __future__ import annotations

from typing import Any

from kvq.runtime.errors import GrammarError

MOST_DEPTH = 64
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
        GrammarError: it nests too deeply.
    """
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
            found[key] = {name: held_exactly(part, depth + 2) for name, part in value.items()}
        else:
            found[key] = value if key in VALUES else held_exactly(value, depth + 1)
    pattern = FORMATS.get(found["format"]) if isinstance(found.get("format"), str) else None
    if pattern is not None:
        del found["format"]
        if "pattern" in found:
            found["allOf"] = [*found.get("allOf", []), {"pattern": pattern}]
        else:
            found["pattern"] = pattern
    return found
