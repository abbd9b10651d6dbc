"""Requests of /v1/responses: what they ask for in terms of a chat, and conversations kept between them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from kvq.runtime.bundle.fields import encodable
from kvq.runtime.errors import RequestError
from kvq.runtime.server.fields import Fields
from kvq.runtime.server.messages import parse_messages
from kvq.runtime.server.protocol import Generation, Settings, parse_generation

MOST_KEPT = 256
MOST_KEPT_CHARACTERS = 1 << 24  # of all kept conversations together
# Fields that are not implemented, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,), "conversation": (), "prompt": (), "max_tool_calls": (), "truncation": ("disabled",),
    "include": ([],), "top_logprobs": (0,), "moderation": (), "context_management": ([],),
}  # fmt: skip
# What /v1/chat/completions has, too, under the same name.
SAME = (
    "temperature", "top_p", "stream", "tool_choice", "parallel_tool_calls", "user", "safety_identifier", "model",
    "prompt_cache_key", "prompt_cache_retention", "service_tier", "reasoning", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "stop", "ignore_eos", "logit_bias", "chat_template_kwargs",
    "policy", "kv_bits",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request for a response.

    Attributes:
        generation: the chat that it asks for.
        messages: of the conversation so far, in the form of chat completions, without the instructions.
        store: whether the conversation is kept for requests that follow.
        echoed: fields that the response repeats.
    """

    generation: Generation
    messages: list[dict[str, Any]]
    store: bool
    echoed: dict[str, Any] = field(default_factory=dict)


class Kept:
    """Responses that a `previous_response_id` can name, in memory, the oldest dropped beyond the bounds. Any thread."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[list[dict[str, Any]], dict[str, Any], int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def add(self, identity: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> None:
        """Keep a conversation up to a response, and the response's body."""
        size = len(json.dumps(messages)) + len(json.dumps(body))
        with self._lock:
            self._held[identity] = messages, body, size
            self._characters += size
            while len(self._held) > MOST_KEPT or self._characters > MOST_KEPT_CHARACTERS:
                self._characters -= self._held.popitem(last=False)[1][2]

    def find(self, identity: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages and body.

        Raises:
            RequestError: 404, it is not kept.
        """
        with self._lock:
            found = self._held.get(identity)
            if found is None:
                raise _unknown(identity)
            self._held.move_to_end(identity)
            return found[0], found[1]

    def remove(self, identity: str) -> None:
        """Forget it; RequestError (404) if it is not kept."""
        with self._lock:
            if identity not in self._held:
                raise _unknown(identity)
            self._characters -= self._held.pop(identity)[2]


def _unknown(identity: str) -> RequestError:
    return RequestError(
        f"no response {identity!r:.80} is kept, at most {MOST_KEPT} are, until the server ends; send the whole"
        " conversation as input",
        404,
        "response_not_found",
        "previous_response_id",
    )


def parse_response(body: dict[str, Any], defaults: Settings, kept: Kept) -> Asked:
    """A request for /v1/responses.

    Raises:
        RequestError, SamplingError: as `kvq.runtime.server.protocol.parse_generation`; 404 for a previous response
            that is not kept.
    """
    fields = Fields(body)
    fields.neutral(NEUTRAL)
    stream_options = Fields(fields.object("stream_options") or {}, "stream_options.")
    stream_options.boolean("include_obfuscation")
    stream_options.done()
    messages = _input(fields.take("input"))
    if (previous := fields.text("previous_response_id")) is not None:
        messages = kept.find(previous)[0] + messages
    instructions = fields.text("instructions")
    chat: dict[str, Any] = {name: fields.take(name) for name in SAME}
    chat["messages"] = [{"role": "system", "content": instructions}] * bool(instructions) + messages
    chat["max_tokens"] = fields.integer("max_output_tokens", least=1)
    chat["tools"], shown = _tools(fields.take("tools"))
    text = Fields(fields.object("text") or {}, "text.")
    chat["response_format"] = form = text.object("format")
    text.take("verbosity")
    text.done()
    metadata, store = fields.object("metadata"), fields.boolean("store")
    fields.done()
    echoed = {
        "instructions": instructions, "metadata": metadata or {}, "previous_response_id": previous,
        "max_output_tokens": chat["max_tokens"], "tools": shown, "tool_choice": chat["tool_choice"] or "auto",
        "parallel_tool_calls": chat["parallel_tool_calls"] is not False, "temperature": chat["temperature"],
        "top_p": chat["top_p"], "text": {"format": form or {"type": "text"}}, "truncation": "disabled",
        "store": store is not False, "background": False,
    }  # fmt: skip
    _check_text(echoed)
    return Asked(parse_generation(chat, True, defaults), messages, store is not False, echoed)


def _check_text(echoed: dict[str, Any]) -> None:
    """Raise RequestError for a field that cannot be sent back: lone surrogates are no text."""
    for name, value in echoed.items():
        if not encodable(json.dumps(value, ensure_ascii=False)):
            raise RequestError(f"{name} holds lone surrogates, which are no characters", param=name)


def _input(value: Any) -> list[dict[str, Any]]:
    """Messages of a text, or of a list of items: messages, calls of functions, what these gave."""
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RequestError("input must be a non-empty text or list of items", param="input")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise RequestError(f"{where} must be an object", param=where)
        kind = item.get("type", "message")
        if kind == "reasoning":  # of another model's; no template reads it
            continue
        if kind == "function_call":
            called = messages[-1] if messages and messages[-1].get("tool_calls") else None
            if called is None:
                called = {"role": "assistant", "content": "", "tool_calls": []}
                messages.append(called)
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            called["tool_calls"].append({"id": item.get("call_id"), "type": "function", "function": function})
            continue
        if kind == "function_call_output":
            message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        elif kind == "message":
            message = {name: held for name, held in item.items() if name not in ("type", "phase")}
        else:
            raise RequestError(f"{where}.type {kind!r:.40} is not supported; send messages and functions", param=where)
        _check(message, where)
        messages.append(message)
    if not messages:
        raise RequestError("input has no message; give one", param="input")
    return messages


def _check(message: dict[str, Any], where: str) -> None:
    """Refuse a message by the name that it has in the request."""
    try:
        parse_messages([message])
    except RequestError as error:
        text, param = str(error).replace("messages[0]", where), (error.param or where).replace("messages[0]", where)
        raise RequestError(text, param=param) from None


def _tools(value: Any) -> tuple[Any, list[Any]]:
    """Tools as chat completions have them, and as they were sent."""
    if not isinstance(value, list):
        return value, []
    found = []
    for i, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise RequestError(f"tools[{i}].type must be function; kvq calls no others", param=f"tools[{i}]")
        function = {name: held for name, held in tool.items() if name != "type" and held is not None}
        found.append({"type": "function", "function": function})
    return found, value
