"""Messages of a chat, as clients send them and as they got them, to what chat templates take."""

from __future__ import annotations

import json
from typing import Any

from kvq.runtime.errors import RequestError
from kvq.runtime.server.fields import Fields
from kvq.runtime.text.tools import NAME

MOST_MESSAGES = 4096
MOST_CALLS = 128
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Kinds of content parts whose text is the message's.
TEXT_PARTS = ("text", "input_text", "output_text")
# What clients add to a message, or send back as they got it, and no template looks at.
HINTS = ("id", "annotations", "cache_control", "created_at", "refusal", "status", "object", "index", "finish_reason")
# The same, where it has to be empty: it would be a part of the conversation.
EMPTY = ("function_call", "audio", "images", "image_url", "file_ids", "attachments")


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """A list of messages, each with role, content as one text, and what else templates read.

    Raises:
        RequestError: a message that is none; `param` says which.
    """
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a non-empty list of {role, content}", param="messages")
    if len(value) > MOST_MESSAGES:
        raise RequestError(f"at most {MOST_MESSAGES} messages are taken; send fewer", param="messages")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(value)]
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", [])}
    for message in messages:
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", param=where)
    fields = Fields(message, where + ".")
    role = fields.take("role")
    if role not in ROLES:
        fields.refuse("role", f"must be one of {', '.join(ROLES)}")
    given, content = "content" in message, fields.take("content")
    calls = _calls(fields, where)
    for name in HINTS:
        fields.take(name)
    for name in EMPTY:
        if fields.take(name):
            fields.refuse(name, "is not supported; leave it out")
    found: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    found["content"] = _content(content, where, given or bool(calls) or role == "assistant")
    for name, *others in (["name", "tool_name"], ["tool_call_id"], ["reasoning_content", "reasoning", "thinking"]):
        if text := fields.text(name, *others):
            found[name] = text
    fields.done()
    if calls:
        if role != "assistant":
            fields.refuse("tool_calls", "are an assistant's; leave them out")
        found["tool_calls"] = calls
    return found


def _content(content: Any, where: str, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of text parts", param=where + ".content")
    return content


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    raise RequestError(f"{where}.content may hold text parts only", param=where + ".content")


def _calls(fields: Fields, where: str) -> list[dict[str, Any]]:
    """Tool calls that an assistant has made, with arguments as objects, as templates take them."""
    value = fields.take("tool_calls")
    if value is None or value == []:
        return []
    if not isinstance(value, list) or len(value) > MOST_CALLS or not all(isinstance(call, dict) for call in value):
        fields.refuse("tool_calls", f"must be a list of at most {MOST_CALLS} {{id, type, function}}")
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(value)]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(function, dict):
        raise RequestError(f"{where}.function.name must be the name of a function", param=where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(f"{where}.function.arguments must be JSON", param=where) from None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments must be an object, as JSON text", param=where)
    identity = call.get("id")
    if identity is not None and not isinstance(identity, str):
        raise RequestError(f"{where}.id must be a string", param=where)
    return {"id": identity or "", "type": "function", "function": {"name": name, "arguments": arguments}}
