"""What a request asks its text to be: `response_format`, and the fields that other servers have for it."""

from __future__ import annotations

from typing import Any

from kvq.runtime.errors import GrammarError, RequestError
from kvq.runtime.server.fields import Fields
from kvq.runtime.text.grammar import Structure, structure_of

ANY_OBJECT = {"type": "object"}
KINDS = ("schema", "regex", "grammar", "choice")
# Fields of vLLM and llama.cpp -> the kind of structure.
GUIDED = {
    "guided_json": "schema", "json_schema": "schema", "guided_regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar",
}  # fmt: skip
INNER = {"json": "schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
FORMATS = "text, json_object, json_schema, regex or grammar"


def parse_structure(fields: Fields) -> Structure | None:
    """The structure that a request's fields ask for; None for none.

    Raises:
        RequestError: a field is of a wrong form, or two ask for different things; `param` is its name.
    """
    found: list[tuple[str, str, Any]] = []  # field, kind, value
    response_format = fields.object("response_format")
    if response_format is not None and (asked := _format(Fields(response_format, "response_format."))) is not None:
        found.append(("response_format", *asked))
    for name, kind in GUIDED.items():
        value = fields.take(name)
        if value is not None:
            found.append((name, kind, value))
    inner = Fields(fields.object("structured_outputs") or {}, "structured_outputs.")
    for name, kind in INNER.items():
        value = inner.take(name)
        if value is not None:
            found.append(("structured_outputs." + name, kind, value))
    if inner.boolean("json_object"):
        found.append(("structured_outputs.json_object", "schema", ANY_OBJECT))
    inner.done()
    if len(found) > 1:
        raise RequestError(f"{found[0][0]} and {found[1][0]} exclude each other; give one", param=found[1][0])
    for name, kind, value in found:
        try:
            return structure_of(**{kind: value})
        except GrammarError as error:
            raise RequestError(f"{name}: {error}", param=name) from None
    return None


def _format(fields: Fields) -> tuple[str, Any] | None:
    """Kind and value that `response_format` asks for."""
    kind = fields.text("type")
    value = fields.take("schema", "value", "pattern", "regex", "grammar")
    inner = fields.object("json_schema")
    fields.take("strict"), fields.take("name"), fields.take("description")
    fields.done()
    if inner is not None:
        value = inner.get("schema", value)
    if kind == "text":
        return None
    if kind in ("json_object", "json"):
        return "schema", ANY_OBJECT if value is None else value
    if kind not in ("json_schema", "regex", "grammar"):
        fields.refuse("type", f"must be {FORMATS}")
    if value is None:
        fields.refuse("json_schema.schema" if kind == "json_schema" else "value", "is missing; give it")
    return ("schema" if kind == "json_schema" else kind), value
