"""Answers of /v1/responses: whole ones, and the events of a stream in the order that its clients expect."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvq.runtime.server.asking import Asked
from kvq.runtime.server.choices import Call, Choice, Piece
from kvq.runtime.server.jobs import Event, Step
from kvq.runtime.server.preparing import Prepared
from kvq.runtime.server.refusals import error_body
from kvq.runtime.server.responses import LINE_ENDS, extension


class ResponseReply:
    """One response on its way.

    Args:
        asked: the request.
        prepared: the same in the model's terms.
        model: name of the model.
        choice: its text.
        keep: told identity, messages and body of a response that ends, to keep them.

    Attributes:
        choices: the one.
        media_type: of a stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        asked: Asked,
        prepared: Prepared,
        model: str,
        choice: Choice,
        keep: Callable[[str, list[dict[str, Any]], dict[str, Any]], None],
    ) -> None:
        self.request, self.choices = prepared.request, [choice]
        self._asked, self._prepared, self._choice, self._keep = asked, prepared, choice, keep
        self._head = {
            "id": "resp_" + secrets.token_hex(16), "object": "response", "created_at": int(time.time()), "model": model
        }  # fmt: skip
        self._message = "msg_" + secrets.token_hex(16)
        self._items: list[dict[str, Any]] = []  # those of the output that are complete, or on their way
        self._sequence = 0
        self._open: int | None = None  # which of them is on its way

    # -- streams ------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """That the response has begun."""
        body = self._body("in_progress")
        return self._event("response.created", response=body) + self._event("response.in_progress", response=body)

    def frames(self, events: Sequence[Event]) -> bytes:
        """The events of what has happened."""
        found = b""
        for event in events:
            if not isinstance(event, Step):
                continue
            piece = self._choice.take(event)
            if piece.text:
                found += self._said(piece.text)
            for number, identity, name, arguments in piece.calls:
                found += self._called(number, identity, name, arguments)
            if piece.finish is not None:
                found += self._closed()
                found += self._finished(piece)
        return found

    def ending(self) -> bytes:
        """Nothing: the last event has said it."""
        return b""

    def failure(self, error: BaseException) -> bytes:
        """An error in place of what is left."""
        body = error_body(error)["error"]
        return self._event("error", **{name: body[name] for name in ("code", "message", "param")})

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The response at once."""
        self.frames(events)
        return self._body(self._status())

    def _event(self, kind: str, **members: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(LINE_ENDS)
        return f"event: {kind}\ndata: {text}\n\n".encode()

    def _said(self, text: str) -> bytes:
        """More of the message."""
        found = b""
        if self._open is None or self._items[self._open]["type"] != "message":
            found += self._closed()
            found += self._opened({
                "type": "message", "id": self._message if not self._items else "msg_" + secrets.token_hex(16),
                "status": "in_progress", "role": "assistant", "content": [],
            })  # fmt: skip
            self._items[-1]["content"].append(_part(""))
            found += self._event("response.content_part.added", **self._place(), content_index=0, part=_part(""))
        self._items[-1]["content"][0]["text"] += text
        return found + self._event(
            "response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[]
        )

    def _called(self, number: int, identity: str, name: str, arguments: str) -> bytes:
        """A call of a function, or more of its arguments."""
        found = b""
        if identity:
            found += self._closed()
            found += self._opened({
                "type": "function_call", "id": "fc_" + secrets.token_hex(16), "status": "in_progress",
                "call_id": identity, "name": name, "arguments": "",
            })  # fmt: skip
        if arguments:
            self._items[-1]["arguments"] += arguments
            found += self._event("response.function_call_arguments.delta", **self._place(), delta=arguments)
        return found

    def _opened(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        self._open = len(self._items) - 1
        return self._event("response.output_item.added", output_index=self._open, item=dict(item))

    def _closed(self) -> bytes:
        """The end of the item on its way."""
        if self._open is None:
            return b""
        item, place = self._items[self._open], self._place()
        cut = self._choice.finish in ("length", "context")
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            found = self._event("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=[])
            found += self._event("response.content_part.done", **place, content_index=0, part=part)
        else:
            found = self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            )
        found += self._event("response.output_item.done", output_index=self._open, item=item)
        self._open = None
        return found

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _finished(self, piece: Piece) -> bytes:
        """The last event; the conversation is kept, if it is to be."""
        status = self._status()
        body = self._body(status)
        if self._asked.store:
            self._keep(body["id"], [*self._asked.messages, self._answer()], body)
        return self._event(f"response.{status}", response=body)

    # -- bodies -------------------------------------------------------------------------------------

    def _status(self) -> str:
        return "incomplete" if self._choice.finish in ("length", "context") else "completed"

    def _answer(self) -> dict[str, Any]:
        """The answer as a message of a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self._choice.text}
        if self._choice.calls:
            message["tool_calls"] = [_call(call) for call in self._choice.calls]
        return message

    def _body(self, status: str) -> dict[str, Any]:
        done, finish = self._choice.done, self._choice.finish
        body: dict[str, Any] = {**self._head, "status": status, "error": None, **self._asked.echoed}
        body["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        body["output"], body["usage"] = list(self._items), None
        if done is not None:
            body["usage"] = self._usage(done.cached)
            body["kvq"] = extension(done.stats, finish, self._prepared.most)
        return body

    def _usage(self, cached: int) -> dict[str, Any]:
        prompt, generated = sum(len(job.ids) for job in self._prepared.jobs), self._choice.generated
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + generated,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: Call) -> dict[str, Any]:
    """A call in a chat's message; arguments that max_tokens has cut are none."""
    try:
        known = isinstance(json.loads(call.arguments), dict)
    except (ValueError, RecursionError):
        known = False
    function = {"name": call.name, "arguments": call.arguments if known else "{}"}
    return {"id": call.id, "type": "function", "function": function}
