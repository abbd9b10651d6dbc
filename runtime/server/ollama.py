"""Ollama's API: /api/chat and /api/generate to what kvq runs, and its answers, whole or a line of JSON at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kvq.runtime.errors import GrammarError, RequestError
from kvq.runtime.server.choices import Call, Choice
from kvq.runtime.server.fields import Fields, is_integer
from kvq.runtime.server.jobs import Event, Step
from kvq.runtime.server.messages import parse_messages
from kvq.runtime.server.preparing import Prepared
from kvq.runtime.server.protocol import Generation, Settings, parse_sampling, parse_settings, parse_stop
from kvq.runtime.server.refusals import error_body
from kvq.runtime.server.responses import extension
from kvq.runtime.server.tooling import parse_tools
from kvq.runtime.session.sampling import SamplingOptions, make_sampler
from kvq.runtime.text.grammar import Structure, structure_of

# Fields and options that cannot change what an answer says: of loading, of memory, of how work is done.
HINTS = ("keep_alive", "think", "truncate", "context")
OPTION_HINTS = (
    "num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_gqa", "numa", "low_vram", "f16_kv",
    "use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only", "draft_num_predict",
)  # fmt: skip
OPTION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,), "mirostat_eta": (0.1,), "mirostat_tau": (5, 5.0), "tfs_z": (1,), "typical_p": (1,),
    "penalize_newline": (True, False), "repeat_last_n": (-1, 64),
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": ("",), "images": ([],), "template": ("",), "logprobs": (False,),
                                       "top_logprobs": (0,)}  # fmt: skip
FINISH = {"context": "length", "tool_calls": "stop"}


def parse_chat(body: dict[str, Any], defaults: Settings) -> Generation:
    """A request for /api/chat.

    Raises:
        RequestError, SamplingError: as `kvq.runtime.server.protocol.parse_generation`.
    """
    fields = Fields(body)
    messages = parse_messages(fields.take("messages"))
    tools = parse_tools(fields)
    begun = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    return _generation(fields, defaults, chat=True, messages=messages, tools=tools, begun=begun)


def parse_generate(body: dict[str, Any], defaults: Settings) -> Generation | None:
    """A request for /api/generate; None for one without a prompt, which only loads the model.

    Raises:
        RequestError, SamplingError: as `kvq.runtime.server.protocol.parse_generation`.
    """
    fields = Fields(body)
    prompt, system, raw = fields.text("prompt"), fields.text("system"), fields.boolean("raw")
    if not prompt:
        return None
    if raw:
        return _generation(fields, defaults, chat=False, prompts=[prompt])
    messages = [{"role": "system", "content": system}] if system else []
    return _generation(fields, defaults, chat=True, messages=[*messages, {"role": "user", "content": prompt}])


def _generation(fields: Fields, defaults: Settings, **given: Any) -> Generation:
    fields.neutral(NEUTRAL)
    for name in HINTS:
        fields.take(name)
    stream, structure = fields.boolean("stream"), _format(fields.take("format"))
    if structure is not None and given.get("tools") is not None:
        fields.refuse("format", "and tools exclude each other; give one")
    sampling, stop, most = _options(Fields(fields.object("options") or {}, "options."))
    generation = Generation(
        model=_plain_name(fields.text("model", "name")),
        stream=stream is not False,
        max_tokens=most,
        stop=stop,
        sampling=sampling,
        structure=structure,
        settings=parse_settings(fields, defaults),
        context_shift=fields.boolean("shift"),
        **given,
    )
    fields.done()
    make_sampler(**generation.sampling)
    return generation


def _plain_name(name: str | None) -> str | None:
    """A model's name without the tag that ollama's clients put behind it."""
    return name and name.removesuffix(":latest")


def _format(value: Any) -> Structure | None:
    if value is None or value == "":
        return None
    try:
        return structure_of(schema={"type": "object"} if value == "json" else value)
    except GrammarError as error:
        raise RequestError(f"format: {error}", param="format") from None


def _options(fields: Fields) -> tuple[SamplingOptions, list[str], int | None]:
    """Sampling, stop strings, and most tokens."""
    fields.neutral(OPTION_NEUTRAL)
    for name in OPTION_HINTS:
        fields.take(name)
    most = fields.take("num_predict")
    if most is not None and (not is_integer(most) or most == 0 or most < -2):
        fields.refuse("num_predict", "must be an integer of at least 1, or -1 for as many as there is room for")
    sampling, stop = parse_sampling(fields), parse_stop(fields.take("stop"))
    fields.done()
    return sampling, stop, None if most is None or most < 0 else most


class OllamaReply:
    """An answer on its way, in ollama's form.

    Args:
        prepared: the request.
        model: name of the model.
        choice: its text.
        chat: of /api/chat, not /api/generate.
    """

    media_type = "application/x-ndjson"

    def __init__(self, prepared: Prepared, model: str, choice: Choice, chat: bool) -> None:
        self.request = prepared.request
        self.choices = [choice]
        self._prepared, self._model, self._choice, self._chat = prepared, model, choice, chat
        self._begun = time.monotonic_ns()
        self._first = self._last = 0  # of the tokens

    def opening(self) -> bytes:
        """Nothing."""
        return b""

    def frames(self, events: Sequence[Event]) -> bytes:
        """A line for each piece of text, and for each call that is complete."""
        lines = []
        for event in events:
            if not isinstance(event, Step):
                continue
            text, finished = self._take(event)
            if text:
                lines.append(self._body(text, []))
            if finished is not None:
                lines += [self._body("", self._choice.calls)] if self._choice.calls else []
                lines.append(self._body("", []) | self._end())
        return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)

    def ending(self) -> bytes:
        """Nothing: the last line has said it."""
        return b""

    def failure(self, error: BaseException) -> bytes:
        """An error in the form that ollama's clients read."""
        return json.dumps(ollama_error(error)).encode() + b"\n"

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The answer at once."""
        for event in events:
            if isinstance(event, Step):
                self._take(event)
        return self._body(self._choice.text, self._choice.calls) | self._end()

    def _take(self, step: Step) -> tuple[str, str | None]:
        self._first, self._last = self._first or step.made, step.made
        piece = self._choice.take(step)
        return piece.text, piece.finish

    def _body(self, text: str, calls: Sequence[Call]) -> dict[str, Any]:
        said: dict[str, Any] = {"response": text}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if calls:
                message["tool_calls"] = [_call(call) for call in calls]
            said = {"message": message}
        return {"model": self._model, "created_at": now(), **said, "done": False}

    def _end(self) -> dict[str, Any]:
        """What the last body says besides; times in nanoseconds."""
        done, finish = self._choice.done, self._choice.finish
        return {
            "done": True,
            "done_reason": FINISH.get(finish or "", finish),
            "total_duration": self._last - self._begun,
            "load_duration": 0,
            "prompt_eval_count": sum(len(job.ids) for job in self._prepared.jobs),
            "prompt_eval_duration": self._first - self._begun,
            "eval_count": self._choice.generated,
            "eval_duration": self._last - self._first,
            "kvq": None if done is None else extension(done.stats, finish, self._prepared.most),
        }


def _call(call: Call) -> dict[str, Any]:
    """A call with its arguments as an object, where they are one that JSON can send."""
    try:
        arguments = json.loads(call.arguments)
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # cut by max_tokens, or no finite numbers, or half a surrogate
        arguments = {}
    return {"id": call.id, "function": {"name": call.name, "arguments": arguments}}


def ollama_error(error: BaseException) -> dict[str, Any]:
    """An error's body."""
    return {"error": error_body(error)["error"]["message"]}


def now() -> str:
    """The time, as ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
