"""Request bodies of the OpenAI API to what kvq runs; what would be ignored is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from kvq.runtime.errors import RequestError
from kvq.runtime.session.sampling import DEFAULTS, SamplingOptions, make_sampler

MOST_STOPS = 4
MOST_NUMBER = 1e300
MOST_COMPLETION_LOGPROBS = 5
MOST_TOP_LOGPROBS = 20
COMPLETION_MAX_TOKENS = 16  # what the API says a completion has if the request names no number
# Fields that kvq does not implement, with the values that ask for nothing. Null asks for nothing everywhere.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Fields that name or label a request and do not change its answer.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Of a message that a client sends back as it got it; empty there.
EMPTY_IN_MESSAGES = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content")
ROLES = ("system", "developer", "user", "assistant")


class Settings(NamedTuple):
    """What a session is made with. Sessions of equal settings and equal tokens hold the same bytes.

    policy, kv_bits, kv_memory, recent, sink, prefill, protect_bits: as in `Model.session`; None as there.
    """

    policy: str | None = None
    kv_bits: float | None = None
    kv_memory: float | None = None
    recent: int = 16
    sink: int = 4
    prefill: str = "auto"
    protect_bits: int | None = None


@dataclass(frozen=True)
class Generation:
    """A request, checked as far as that needs no model.

    Attributes:
        chat: of /v1/chat/completions, not /v1/completions.
        prompt: text or token ids, of a completion.
        messages: {"role", "content"} each, of a chat.
        model: the name asked for; None takes the one that is served.
        stream, include_usage: server-sent events, and usage in a last one.
        max_tokens: most tokens to generate; None leaves it to the server.
        stop: strings that end the text.
        sampling: options of `make_sampler`.
        top_logprobs: alternatives to report with each token; None reports no log-probabilities.
        settings: of the session.
    """

    chat: bool
    prompt: str | list[int] = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    top_logprobs: int | None = None
    settings: Settings = field(default_factory=Settings)


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        RequestError: it is none.
    """

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        value = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the body is not JSON ({error!s:.100}); send an object as the OpenAI API describes"
        ) from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def parse_generation(body: dict[str, Any], chat: bool, defaults: Settings) -> Generation:
    """A request for a chat completion or a completion.

    Args:
        body: the JSON object.
        chat: of /v1/chat/completions.
        defaults: the server's settings, for a request that names neither policy nor kv_bits.

    Raises:
        RequestError: a field is missing, of a wrong type or not supported; `param` is its name.
        SamplingError: a sampling option is out of its range.
    """
    fields = _Fields(body)
    for name, values in NEUTRAL.items():
        value = fields.take(name)
        if value is not None and not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise RequestError(f"{name} is not supported; leave it out", param=name)
    for name in LABELS:
        fields.take(name)
    messages, prompt = (_messages(fields.take("messages")), "") if chat else ([], _prompt(fields.take("prompt")))
    stream = fields.boolean("stream")
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise RequestError("stream_options is only for stream=true", param="stream_options")
    inner = _Fields(options or {}, "stream_options.")
    include_usage = inner.boolean("include_usage")
    inner.boolean("include_obfuscation")  # padding against traffic analysis; no part of the answer
    inner.done()
    generation = Generation(
        chat=chat,
        prompt=prompt,
        messages=messages,
        model=fields.text("model"),
        stream=stream,
        include_usage=include_usage,
        max_tokens=_max_tokens(fields, chat),
        stop=_stop(fields.take("stop")),
        sampling=_sampling(fields),
        top_logprobs=_top_logprobs(fields, chat),
        settings=_settings(fields, defaults),
    )
    fields.done()
    make_sampler(**generation.sampling)  # refuses what is out of range now, not in the queue
    return generation


class _Fields:
    """The fields of an object, taken one by one; `done` refuses what nobody took."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self.values = dict(values)
        self.prefix = prefix

    def take(self, name: str) -> Any:
        """The value, None if it is not there or null."""
        return self.values.pop(name, None)

    def typed(self, name: str, what: str, fits: Callable[[Any], bool]) -> Any:
        value = self.take(name)
        if value is not None and not fits(value):
            raise RequestError(f"{self.prefix}{name} must be {what}", param=self.prefix + name)
        return value

    def boolean(self, name: str) -> bool:
        return bool(self.typed(name, "true or false", lambda v: isinstance(v, bool)))

    def text(self, name: str) -> str | None:
        return self.typed(name, "a string", lambda v: isinstance(v, str))

    def integer(self, name: str, least: int, most: int | None = None) -> int | None:
        what = f"an integer of at least {least}" + ("" if most is None else f" and at most {most}")
        return self.typed(name, what, lambda v: _is_integer(v) and least <= v and (most is None or v <= most))

    def number(self, name: str) -> float | None:
        # 1 and 400 zeros is an integer in JSON, and 1e400 infinity.
        value = self.typed(name, f"a number below {MOST_NUMBER:g}", _is_number)
        return None if value is None else float(value)

    def object(self, name: str) -> dict[str, Any] | None:
        return self.typed(name, "an object", lambda v: isinstance(v, dict))

    def done(self) -> None:
        for name in self.values:
            raise RequestError(f"unknown field {self.prefix + name!r:.80}; leave it out", param=self.prefix + name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST_NUMBER < value < MOST_NUMBER


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _max_tokens(fields: _Fields, chat: bool) -> int | None:
    given = [fields.integer(name, 1) for name in (("max_completion_tokens", "max_tokens") if chat else ("max_tokens",))]
    named = {value for value in given if value is not None}
    if len(named) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one", param="max_tokens")
    return named.pop() if named else None if chat else COMPLETION_MAX_TOKENS


def _stop(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop must be a string or a list of at most {MOST_STOPS}, none of them empty", param="stop")
    if any("\ud800" <= character <= "\udfff" for stop in stops for character in stop):
        raise RequestError("stop must be text; a lone surrogate is no character", param="stop")
    return stops


def _sampling(fields: _Fields) -> SamplingOptions:
    options: SamplingOptions = {**DEFAULTS}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = fields.number(name)
        if value is not None:
            options[name] = value
    for name in ("top_k", "seed"):
        count = fields.integer(name, 0)
        if count is not None:
            options[name] = count  # type: ignore[literal-required]
    return options


def _top_logprobs(fields: _Fields, chat: bool) -> int | None:
    if not chat:
        return fields.integer("logprobs", 0, MOST_COMPLETION_LOGPROBS)
    wanted, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top and not wanted:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    return (top or 0) if wanted else None


def _settings(fields: _Fields, defaults: Settings) -> Settings:
    policy, kv_bits = fields.text("policy"), fields.number("kv_bits")
    if policy is None and kv_bits is None:
        return defaults
    # A policy or a budget of the request's own stands alone: half of the server's would make a third thing.
    return defaults._replace(policy=policy, kv_bits=kv_bits, kv_memory=None)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_integer(token) for token in value):
        return value
    if isinstance(value, list) and len(value) > 1:
        raise RequestError("several prompts in one request are not supported; send one request each", param="prompt")
    raise RequestError("prompt must be a non-empty string or a list of token ids", param="prompt")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a non-empty list of {role, content}", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", param=where)
    fields = _Fields(message, where + ".")
    role, content = fields.take("role"), fields.take("content")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", param=where + ".role")
    for name in EMPTY_IN_MESSAGES:
        if fields.take(name):
            raise RequestError(f"{where}.{name} is not supported; leave it out", param=f"{where}.{name}")
    fields.done()
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of text parts", param=where + ".content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    raise RequestError(f"{where}.content may hold text parts only", param=where + ".content")
