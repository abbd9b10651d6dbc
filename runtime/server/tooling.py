"""The fields of a request that say which tools there are, and whether one has to be called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kvq.runtime.bundle.fields import encodable
from kvq.runtime.errors import RequestError
from kvq.runtime.server.fields import Fields
from kvq.runtime.text.tools import NAME, Tool

MOST_TOOLS = 128
MOST_CHARACTERS = 1 << 18  # of all definitions together
CHOICES = "none, auto, required or {type: function, function: {name}}"


@dataclass(frozen=True)
class Tools:
    """What a request says of tools.

    Attributes:
        offered: those that can be called.
        forced: one of them has to be called.
        parallel: several may be called in one answer.
        shown: those that the model is told of; all, whatever can be called.
    """

    offered: tuple[Tool, ...]
    forced: bool
    parallel: bool
    shown: tuple[Tool, ...]


def parse_tools(fields: Fields) -> Tools | None:
    """The tools of a request; None where it has none, or none may be called.

    Raises:
        RequestError: a definition or a choice of a wrong form; `param` is its name.
    """
    value, choice = fields.take("tools"), fields.take("tool_choice")
    parallel = fields.boolean("parallel_tool_calls")
    if value is None or value == []:
        if choice not in (None, "none", "auto"):
            fields.refuse("tool_choice", "needs tools; give them, or leave it out")
        return None
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        fields.refuse("tools", f"must be a list of at most {MOST_TOOLS} {{type: function, function}}")
    tools = tuple(_tool(each, f"tools[{i}]") for i, each in enumerate(value))
    written = json.dumps([tool.definition for tool in tools], ensure_ascii=False)
    if not encodable(written):
        fields.refuse("tools", "hold lone surrogates, which are no characters")
    if len(written) > MOST_CHARACTERS:
        fields.refuse("tools", f"have more than {MOST_CHARACTERS} characters; shorten their descriptions")
    if len({tool.name for tool in tools}) < len(tools):
        fields.refuse("tools", "must have different names")
    offered, forced = _chosen(fields, choice, tools)
    named = isinstance(choice, dict)  # one call of this function, be it the only one
    return Tools(offered, forced, parallel is not False and not named, tools)


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise RequestError(f"{where}.type must be function; kvq calls no others", param=where)
    function = value.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object with a name", param=where)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(f"{where}.function.name must be 1 to 128 letters, digits, _, . or -", param=where)
    if not isinstance(parameters, dict | None):
        raise RequestError(f"{where}.function.parameters must be a JSON schema", param=where)
    if not isinstance(function.get("description", ""), str | None):
        raise RequestError(f"{where}.function.description must be a string", param=where)
    parameters = parameters or {"type": "object", "properties": {}}
    definition = {"type": "function", "function": {**function, "parameters": parameters}}
    return Tool(name, parameters, definition)


def _chosen(fields: Fields, choice: Any, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], bool]:
    """Which may be called, and whether one has to."""
    if choice in (None, "auto"):
        return tools, False
    if choice == "none":
        return (), False
    if choice in ("required", "any"):
        return tools, True
    inner = choice.get("function", choice) if isinstance(choice, dict) else None
    if not isinstance(inner, dict) or choice.get("type", "function") != "function":
        fields.refuse("tool_choice", f"must be {CHOICES}")
    offered = tuple(tool for tool in tools if tool.name == inner.get("name"))
    if not offered:
        fields.refuse("tool_choice", "names a function that is not among tools")
    return offered, True
