"""JSON schemas of the kinds that programs ask for: records, enumerations, formats, unions, recursion, bounds."""

# ruff: noqa: E501 # a schema a line

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": t} for t in ("string", "integer", "number", "boolean", "null"))
SHORT = {"type": "string", "maxLength": 12}


def record(required: bool | list[str] = True, **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others."""
    names = list(properties) if required is True else required or []
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def array(items: Any, least: int = 0, most: int | None = 3) -> dict[str, Any]:
    """A list of few."""
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
ADDRESS = record(street=SHORT, city=SHORT, code={"type": "string", "pattern": "^[0-9]{5}$"})
SCHEMAS: dict[str, Any] = {
    # scalars and their bounds
    "string": SHORT, "integer": {"type": "integer", "minimum": -50, "maximum": 50}, "boolean": BOOLEAN, "null": NULL,
    "number between": {"type": "number", "minimum": 0, "maximum": 1},
    "number above": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    "percentage": {"type": "integer", "minimum": 0, "maximum": 100},
    "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "negative": {"type": "integer", "exclusiveMaximum": 0, "minimum": -999},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 6}, "exact length": {"type": "string", "minLength": 4, "maxLength": 4},
    "several types": {"type": ["string", "integer", "null"], "maxLength": 5}, "anything short": {"enum": [1, "a", None, True, [1], {"b": 2}]},
    # enumerations
    "enum": {"enum": ["red", "green", "blue"]}, "const": {"const": "fixed"}, "const object": {"const": {"a": [1, 2]}},
    "enum of numbers": {"enum": [1, 2.5, -3]}, "enum with quotes": {"enum": ['say "hi"', "back\\slash", "new\nline", "é日😀"]},
    "typed enum": {"type": "string", "enum": ["low", "medium", "high"]}, "many": {"enum": [f"item {i}" for i in range(500)]},
    # patterns
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"}, "phone": {"type": "string", "pattern": "^\\+?[0-9]{7,12}$"},
    "color": {"type": "string", "pattern": "^#[0-9a-f]{6}$"}, "slug": {"type": "string", "pattern": "^[a-z]+(-[a-z]+){0,2}$", "maxLength": 20},
    "version": {"type": "string", "pattern": "^\\d{1,2}\\.\\d{1,2}\\.\\d{1,2}$"}, "alternatives": {"type": "string", "pattern": "^(cat|dog|bird)s?$"},
    "currency": {"type": "string", "pattern": "^(USD|EUR|GBP) [0-9]{1,5}\\.[0-9]{2}$"},
    "inner": {"type": "string", "pattern": "a[0-9]b", "maxLength": 8},
    # records
    "empty record": record(), "person": record(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "address": ADDRESS, "nested": record(person=record(name=SHORT, address=ADDRESS)),
    "optional": record(required=["a"], a=BOOLEAN, b=SHORT, c=BOOLEAN), "all optional": record(required=False, x=BOOLEAN, y=BOOLEAN),
    "nullable": record(middle={"type": ["string", "null"], "maxLength": 8}, born={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9999}, NULL]}),
    "names with signs": record(**{"first name": SHORT, "a.b/c": BOOLEAN, "é": BOOLEAN, 'q"': BOOLEAN}),
    "map": {"type": "object", "patternProperties": {"^[a-z]{1,3}$": BOOLEAN}, "additionalProperties": False, "maxProperties": 2},
    "at least": {"type": "object", "additionalProperties": BOOLEAN, "minProperties": 1, "maxProperties": 2},
    "settings": record(theme={"enum": ["light", "dark"]}, size={"type": "integer", "minimum": 8, "maximum": 72}, beta=BOOLEAN),
    "invoice": record(number={"type": "string", "pattern": "^INV-[0-9]{4}$"}, paid=BOOLEAN, lines=array(record(sku={"type": "string", "pattern": "^[A-Z]{3}$"}, count={"type": "integer", "minimum": 1, "maximum": 9}), 1)),
    "described": {"title": "Dog", "description": "A dog", "type": "object", "properties": {"breed": {"type": "string", "title": "Breed", "maxLength": 9, "examples": ["pug"], "default": "pug"}}, "required": ["breed"], "additionalProperties": False},
    "sentiment": record(sentiment={"enum": ["positive", "neutral", "negative"]}, score={"type": "number", "minimum": 0, "maximum": 1}),
    "weather call": record(city=SHORT, unit={"enum": ["celsius", "fahrenheit"]}, days={"type": "integer", "minimum": 1, "maximum": 7}),
    "coordinates": record(lat={"type": "number", "minimum": -90, "maximum": 90}, lon={"type": "number", "minimum": -180, "maximum": 180}),
    "many fields": record(**{f"field_{i}": BOOLEAN for i in range(20)}),
    "long names": record(**{"name_" + "x" * 50: BOOLEAN}),
    # lists
    "list of strings": array(SHORT), "list of enums": array({"enum": ["a", "b"]}, 2, 4), "matrix": array(array({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), 2, 2),
    "tuple": {"type": "array", "prefixItems": [SHORT, BOOLEAN], "items": False, "minItems": 2}, "old tuple": {"type": "array", "items": [BOOLEAN, NULL], "additionalItems": False, "minItems": 2},
    "empty list": {"type": "array", "maxItems": 0}, "exact list": array(BOOLEAN, 3, 3), "list of records": array(record(id={"type": "integer", "minimum": 1, "maximum": 99}, ok=BOOLEAN), 1, 3),
    "list of unions": array({"anyOf": [BOOLEAN, NULL, {"const": "x"}]}, 1, 4), "embedding": array({"type": "number", "minimum": -1, "maximum": 1}, 3, 3),
    # unions
    "any of": {"anyOf": [BOOLEAN, {"type": "integer", "minimum": 0, "maximum": 9}]}, "one of": {"oneOf": [BOOLEAN, {"type": "string", "maxLength": 4}]},
    "shapes": {"oneOf": [record(kind={"const": "circle"}, r={"type": "integer", "minimum": 1, "maximum": 9}), record(kind={"const": "square"}, a={"type": "integer", "minimum": 1, "maximum": 9})]},
    "any of records": {"anyOf": [record(a=BOOLEAN), record(b=BOOLEAN)]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": BOOLEAN}, "required": ["a"]}, {"type": "object", "properties": {"b": BOOLEAN}, "required": ["b"]}], "additionalProperties": False, "properties": {"a": BOOLEAN, "b": BOOLEAN}},
    "bounds of two": {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 7}]},
    "optional record": {"anyOf": [NULL, record(a=BOOLEAN)]},
    # references and recursion
    "reference": {"$defs": {"flag": BOOLEAN}, "type": "object", "properties": {"a": {"$ref": "#/$defs/flag"}, "b": {"$ref": "#/$defs/flag"}}, "required": ["a", "b"], "additionalProperties": False},
    "definitions": {"definitions": {"id": {"type": "integer", "minimum": 1, "maximum": 99}}, **record(id={"$ref": "#/definitions/id"})},
    "tree": {"$defs": {"node": record(required=["v"], v={"type": "integer", "minimum": 0, "maximum": 9}, kids=array({"$ref": "#/$defs/node"}, 0, 2))}, "$ref": "#/$defs/node"},
    "linked list": {"$defs": {"cell": record(head=BOOLEAN, tail={"anyOf": [NULL, {"$ref": "#/$defs/cell"}]})}, "$ref": "#/$defs/cell"},
    "expression": {"$defs": {"e": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, record(op={"enum": ["+", "*"]}, l={"$ref": "#/$defs/e"}, r={"$ref": "#/$defs/e"})]}}, "$ref": "#/$defs/e"},
    "itself": {"type": "object", "properties": {"n": BOOLEAN, "next": {"anyOf": [NULL, {"$ref": "#"}]}}, "required": ["n", "next"], "additionalProperties": False},
    "chain of references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": BOOLEAN}, "type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2},
    # open ones
    "true": True, "empty": {}, "any object": {"type": "object"}, "any list": {"type": "array"}, "open record": {"type": "object", "properties": {"a": BOOLEAN}, "required": ["a"]},
    "open string": STRING, "open number": NUMBER, "open integer": INTEGER, "values": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}},
    "draft 4": {"$schema": "http://json-schema.org/draft-04/schema#", "type": "object", "properties": {"a": BOOLEAN}, "required": ["a"], "additionalProperties": False},
    "draft 2020": {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/thing.json", **record(a=BOOLEAN)},
    **{f"format {name}": {"type": "string", "format": name} for name in FORMATS},
    **{f"record of {name}": record(when={"type": "string", "format": name}, ok=BOOLEAN) for name in ("date", "uuid", "email")},
    "event": record(title=SHORT, starts={"type": "string", "format": "date-time"}, tags=array({"enum": ["work", "home"]}, 0, 2), where={"anyOf": [NULL, SHORT]}),
    "quiz": record(question=SHORT, options=array(SHORT, 2, 3), answer={"type": "integer", "minimum": 0, "maximum": 2}),
    "extraction": record(entities=array(record(text=SHORT, label={"enum": ["PER", "ORG", "LOC"]}), 0, 2)),
    "film": record(title=SHORT, year={"type": "integer", "minimum": 1888, "maximum": 2100}, genres=array({"enum": ["drama", "comedy", "horror"]}, 1, 2)),
    "plan": record(steps=array(record(tool={"enum": ["search", "read"]}, argument=SHORT), 1, 2), done=BOOLEAN),
}  # fmt: skip

# Valid schemas that ask for what is not held to; each with the word that the refusal names.
REFUSED: dict[str, tuple[Any, str]] = {
    "not": ({"not": {"type": "string"}}, "not"), "unique": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "contains"), "if": ({"if": {}, "then": {}}, "if"),
    "property names": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "dependent": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "dependent schemas": ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    "dependencies": ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    "unevaluated": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "format": ({"type": "string", "format": "bogus"}, "bogus"), "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "overlap": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "elsewhere": ({"$ref": "http://example.com/x.json"}, "http://example.com/x.json"),
    "dynamic": ({"$dynamicRef": "#a"}, "$dynamicRef"), "impossible": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "type": ({"type": "foo"}, "foo"), "lenient": ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    "inside": ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
}  # fmt: skip


def problems(schema: Any, text: str) -> list[str]:
    """What a validator has against a text, formats included; nothing for one that is right."""
    import jsonschema

    default = jsonschema.Draft7Validator if _has_old_tuples(schema) else jsonschema.Draft202012Validator
    kind = jsonschema.validators.validator_for(schema if isinstance(schema, dict) else {}, default)
    checker = jsonschema.FormatChecker(("date", "email", "ipv4", "ipv6", "uuid"))
    checker.checks("date-time", ValueError)(lambda value: datetime.fromisoformat(value) is not None)
    checker.checks("time", ValueError)(lambda value: datetime.fromisoformat(f"2024-01-01T{value}") is not None)
    try:
        value = json.loads(text)
    except ValueError as error:
        return [f"{text!r:.80} is not JSON: {error}"]
    return [f"{text!r:.80}: {error.message:.100}" for error in kind(schema, format_checker=checker).iter_errors(value)]


def _has_old_tuples(schema: Any) -> bool:
    return isinstance(schema, dict) and isinstance(schema.get("items"), list)
