"""Response bodies of the OpenAI API: whole ones and the frames of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from kvq.runtime.server.cached import merged
from kvq.runtime.server.choices import Choice, Piece
from kvq.runtime.server.jobs import Event, Prompted, Step
from kvq.runtime.server.preparing import Prepared
from kvq.runtime.server.refusals import error_body
from kvq.runtime.server.tokens import Offsets, Scored, TokenTexts, chat_logprobs, completion_logprobs
from kvq.runtime.session.statistics import Stats

# The API knows no end of the context; the extension block does.
FINISH = {"stop": "stop", "length": "length", "context": "length", "tool_calls": "tool_calls"}
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


class Reply:
    """One response on its way: what all its bodies have in common, and how far it has got.

    Args:
        prepared: the request.
        model: name of the model.
        fingerprint: of model and version.
        texts: of single tokens, for log-probabilities.
        choices: its texts.

    Attributes:
        choices: as given; `generated` of each counts its tokens.
        media_type: of a stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self, prepared: Prepared, model: str, fingerprint: str, texts: TokenTexts, choices: Sequence[Choice]
    ) -> None:
        request = prepared.request
        self.request, self.choices = request, choices
        self._prepared, self._texts = prepared, texts
        self._prompt_tokens = sum(len(job.ids) for job in prepared.jobs)
        self._offsets = [Offsets() for _ in choices]  # for completion log-probabilities
        self._prompted: dict[int, Prompted] = {}
        self._echoed = set[int]()
        self._caches: dict[int, dict[str, Any]] = {}
        kind = "chat.completion" if request.chat else "text_completion"
        self._common = {
            "id": ("chatcmpl-" if request.chat else "cmpl-") + secrets.token_hex(12),
            "object": kind + ".chunk" if request.chat and request.stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    # -- streams ------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The first frames of a chat stream, which name the role; completions have none."""
        if not self.request.chat:
            return b""
        opened = {"role": "assistant", "content": ""}
        return b"".join(sse(self._framed([self._choice(each, opened, None, None)])) for each in self.choices)

    def frames(self, events: Sequence[Event]) -> bytes:
        """The frames of what has happened; an event that has nothing to tell has none."""
        parts = []
        for event in events:
            if isinstance(event, Prompted):
                self._prompted |= dict.fromkeys(event.choices, event)
            elif isinstance(event, Step):
                body = self._frame(event)
                parts.append(b"" if body is None else sse(body))
        return b"".join(parts)

    def ending(self) -> bytes:
        """The last frames: usage, if it was asked for, and the end."""
        usage = {"choices": [], "usage": self._usage()}
        return (sse(self._common | usage) if self.request.include_usage else b"") + b"data: [DONE]\n\n"

    def failure(self, error: BaseException) -> bytes:
        """The last frame of a stream that ends by an error."""
        return sse(error_body(error))

    def _frame(self, step: Step) -> dict[str, Any] | None:
        choice = self.choices[step.choice]
        piece = choice.take(step)
        logprobs = self._logprobs(choice, piece.released)
        text = self._echo(choice) + piece.text
        if not (text or piece.calls) and logprobs is None and piece.finish is None and step.cache is None:
            return None
        content: Any = text
        if self.request.chat:
            content = ({"content": text} if text else {}) | _deltas(piece)
        body = self._framed([self._choice(choice, content, logprobs, piece.finish)])
        told = {} if piece.done is None else extension(piece.done.stats, piece.finish, self._prepared.most)
        if step.cache is not None:
            told["cache"] = step.cache
        return body | {"kvq": told} if told else body

    def _framed(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._common | {"choices": choices}
        return body | {"usage": None} if self.request.include_usage else body

    # -- whole bodies -------------------------------------------------------------------------------

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """A response that is no stream, of everything that has happened."""
        released: list[list[Step]] = [[] for _ in self.choices]
        for event in events:
            if isinstance(event, Prompted):
                self._prompted |= dict.fromkeys(event.choices, event)
            elif isinstance(event, Step):
                released[event.choice] += self.choices[event.choice].take(event).released
                self._read(event)
        choices = []
        for choice, steps in zip(self.choices, released, strict=True):
            logprobs = self._logprobs(choice, steps, always=True)
            text = self._echo(choice) + choice.text
            body = self._choice(choice, _message(choice) if self.request.chat else text, logprobs, choice.finish)
            choices.append(body | ({"kvq": self._ran(choice)} if len(self.choices) > 1 else {}))
        return self._common | {"choices": choices, "usage": self._usage(), "kvq": self._ran(self.choices[0])}

    def _ran(self, choice: Choice) -> dict[str, Any] | None:
        if choice.done is None:
            return None
        cache = self._caches.get(choice.number)
        told = extension(choice.done.stats, choice.finish, self._prepared.most)
        return told if cache is None else told | {"cache": cache}

    def _read(self, step: Step) -> None:
        """Take what a step says of the cache into what is known of it."""
        if step.cache is not None:
            cells = merged(self._caches.get(step.choice, {}).get("cells", []), step.cache)
            self._caches[step.choice] = step.cache | {"from": 0, "cells": cells}

    # -- parts of both ------------------------------------------------------------------------------

    def _choice(
        self, choice: Choice, content: Any, logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        name = "text" if not self.request.chat else "delta" if self.request.stream else "message"
        return {
            "index": choice.number, name: content, "logprobs": logprobs, "finish_reason": finish and FINISH[finish],
        }  # fmt: skip

    def _echo(self, choice: Choice) -> str:
        """The prompt, once, if it is part of the text."""
        if not self.request.echo or choice.number in self._echoed:
            return ""
        self._echoed.add(choice.number)
        prompt = self.request.prompts[choice.number // self.request.n]
        return prompt if isinstance(prompt, str) else self._texts.all(prompt)

    def _logprobs(self, choice: Choice, steps: list[Step], always: bool = False) -> dict[str, Any] | None:
        """Log-probabilities of steps, and before them of the prompt, where it is part of the text."""
        if self.request.top_logprobs is None:
            return None
        chosen = [Scored(s.response.token, s.response.logprob) for s in steps if s.response is not None]
        alternatives = [step.alternatives for step in steps if step.response is not None]
        if self.request.chat:
            return chat_logprobs(self._texts, chosen, alternatives) if chosen or always else None
        first = None
        if self.request.echo and choice.number not in self._echoed:
            prompted = self._prompted.get(choice.number)
            first = int(self._prepared.jobs[choice.number // self.request.n].ids[0])
            if prompted is not None:
                chosen, alternatives = prompted.scored + chosen, prompted.alternatives + alternatives
        if not chosen and first is None and not always:
            return None
        found = completion_logprobs(self._texts, chosen, alternatives, self._offsets[choice.number], first)
        return found

    def _usage(self) -> dict[str, Any]:
        generated = sum(choice.generated for choice in self.choices)
        cached = sum(
            choice.done.cached for choice in self.choices[:: self.request.n] if choice.done is not None
        )  # one of each prompt
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _deltas(piece: Piece) -> dict[str, Any]:
    """What a step says of calls of tools."""
    if not piece.calls:
        return {}
    calls = []
    for number, identity, name, arguments in piece.calls:
        head = {"id": identity, "type": "function"} if identity else {}
        function = {"name": name, "arguments": arguments} if identity else {"arguments": arguments}
        calls.append({"index": number, **head, "function": function})
    return {"tool_calls": calls}


def _message(choice: Choice) -> dict[str, Any]:
    """A whole message."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
    return message


def extension(stats: Stats, finish: str | None, most: int | None = None) -> dict[str, Any]:
    """The block `kvq` of a response: what really ran, measured from the session's arrays.

    most: tokens that the text might have had.
    """
    held = {name: row["tokens"] for name, row in stats.precisions.items() if row["tokens"]}
    return {
        "policy": stats.policy,
        "policy_reason": stats.policy_reason or None,
        "kv_bits": stats.kv_used_bits,
        "kv_nbytes": stats.kv_nbytes,
        "tokens": stats.tokens,
        "context_shifts": stats.context_shifts,
        "shifted_tokens": stats.shifted_tokens,
        "precisions": held,
        "recent": stats.recent,
        "sink": stats.sink,
        "protect_bits": stats.protect_bits,
        "backend": f"{stats.backend} {stats.backend_detail}".strip(),
        "max_tokens": most,
        "finish_reason": finish,
    }


def sse(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    # Line ends to some clients, where they would split the event; JSON's own escapes are left to split nothing.
    return b"data: " + text.translate(LINE_ENDS).encode() + b"\n\n"
