"""Requests for text: what a body asks for, whichever API it is of, and bodies of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvq.runtime.bundle.fields import encodable
from kvq.runtime.errors import RequestError
from kvq.runtime.server.fields import Fields, is_integer, is_number
from kvq.runtime.server.messages import parse_messages
from kvq.runtime.server.structured import parse_structure
from kvq.runtime.server.tooling import Tools, parse_tools
from kvq.runtime.session.sampling import SamplingOptions, make_sampler
from kvq.runtime.text.grammar import Structure

MOST_STOPS = 16
MOST_STOP_TOKENS = 64
MOST_CHOICES = 16  # of one prompt
MOST_PROMPTS = 64
MOST_TEXTS = 128  # of a request: prompts times choices
MOST_COMPLETION_LOGPROBS = 20
MOST_TOP_LOGPROBS = 20
COMPLETION_MAX_TOKENS = 16  # what the API says a completion has if the request names no number
# Fields that kvq does not implement, with the values that ask for nothing. Null asks for nothing everywhere.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "web_search_options": (), "min_tokens": (0,), "length_penalty": (1,), "use_beam_search": (False,), "top_a": (0,),
    "typical_p": (1,), "tfs_z": (1,), "mirostat": (0,), "dry_multiplier": (0,), "xtc_probability": (0,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "prompt_logprobs": (0,), "return_token_ids": (False,), "bad_words": ([],),
}  # fmt: skip
# Fields that name, label or hint, and cannot change what a request's answer says.
HINTS = (
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "reasoning_effort", "reasoning", "verbosity", "prediction", "cache_prompt", "id_slot", "timings_per_token",
    "priority", "request_id", "keep_alive", "guided_decoding_backend", "include_reasoning", "thinking",
)  # fmt: skip


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
        chat: of messages, not prompts.
        prompts: texts or token ids, of a completion.
        messages: {"role", "content"} each and what else templates read, of a chat.
        begun: the last message is a reply to go on with.
        variables: more names for the chat template.
        model: the name asked for; None takes the one that is served.
        stream, include_usage: the text as it comes, and usage in a last event.
        max_tokens: most tokens to generate; None leaves it to the server, 0 (with `echo`) generates none.
        n: texts for each prompt.
        echo: the prompt is part of the text.
        stop, stop_tokens, ignore_eos: as in `Session.generate`.
        sampling: options of `make_sampler`; those left out are the model's.
        top_logprobs: alternatives to report with each token; None reports no log-probabilities.
        structure: what the text has to be.
        tools: those that can be called; None for none.
        settings: of the session.
        token_bits: say the bits of each cached token, too.
        context_shift: whether a full context makes room; None leaves it to the server.
    """

    chat: bool
    prompts: Sequence[str | list[int]] = ("",)
    messages: list[dict[str, Any]] = field(default_factory=list)
    begun: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    n: int = 1
    echo: bool = False
    stop: list[str] = field(default_factory=list)
    stop_tokens: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    top_logprobs: int | None = None
    structure: Structure | None = None
    tools: Tools | None = None
    settings: Settings = field(default_factory=Settings)
    token_bits: bool = False
    context_shift: bool | None = None


def parse_generation(body: dict[str, Any], chat: bool, defaults: Settings) -> Generation:
    """A request of the OpenAI API for a chat completion or a completion.

    Args:
        body: the JSON object.
        chat: of /v1/chat/completions.
        defaults: the server's settings, for a request that names neither policy nor kv_bits.

    Raises:
        RequestError: a field is missing, of a wrong type or not supported; `param` is its name.
        SamplingError: a sampling option is out of its range.
    """
    fields = Fields(body)
    fields.neutral(NEUTRAL)
    for name in HINTS:
        fields.take(name)
    messages = parse_messages(fields.take("messages")) if chat else []
    prompts = [""] if chat else texts_or_ids(fields.take("prompt"), "prompt", MOST_PROMPTS)
    n = fields.integer("n", least=1, most=MOST_CHOICES) or 1
    if (best_of := fields.integer("best_of", least=1)) not in (None, n):
        fields.refuse("best_of", f"is not supported beyond n, got {best_of!r:.20}; leave it out")
    if n * len(prompts) > MOST_TEXTS:
        fields.refuse("n", f"times the prompts may be {MOST_TEXTS} at most; send several requests")
    echo = bool(fields.boolean("echo"))
    if echo and chat:
        fields.refuse("echo", "is for completions; leave it out")
    stream, include_usage = _stream(fields)
    tools = parse_tools(fields) if chat else None
    structure = parse_structure(fields)
    if structure is not None and tools is not None and tools.offered:
        fields.refuse("response_format", "and tools exclude each other; set tool_choice to none for a last answer")
    generation = Generation(
        chat=chat,
        prompts=prompts,
        messages=messages,
        begun=_begun(fields, messages),
        variables=_variables(fields) if chat else {},
        model=fields.text("model"),
        stream=stream,
        include_usage=include_usage,
        max_tokens=_max_tokens(fields, chat, echo),
        n=n,
        echo=echo,
        stop=parse_stop(fields.take("stop")),
        stop_tokens=_stop_tokens(fields),
        ignore_eos=bool(fields.boolean("ignore_eos")),
        sampling=parse_sampling(fields),
        top_logprobs=_top_logprobs(fields, chat),
        structure=structure,
        tools=tools,
        settings=parse_settings(fields, defaults),
        token_bits=bool(fields.boolean("kv_token_bits")),
        context_shift=fields.boolean("context_shift"),
    )
    fields.done()
    make_sampler(**generation.sampling)  # refuses what is out of range now, not in the queue
    return generation


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Whether the text is streamed, and its usage told at the end."""
    stream = bool(fields.boolean("stream"))
    options = fields.object("stream_options")
    if options and not stream:
        fields.refuse("stream_options", "is only for stream=true")
    inner = Fields(options or {}, "stream_options.")
    include_usage = bool(inner.boolean("include_usage"))
    # Padding against traffic analysis, and usage in between: no part of the answer.
    inner.boolean("include_obfuscation"), inner.boolean("continuous_usage_stats")
    inner.done()
    return stream, include_usage


def _begun(fields: Fields, messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is a reply that is to go on: an assistant's, unless the request says otherwise."""
    ends = bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    new, old = fields.boolean("add_generation_prompt"), fields.boolean("continue_final_message")
    if old and not ends:
        fields.refuse("continue_final_message", "needs a last message of the assistant's")
    if new and old:
        fields.refuse("continue_final_message", "and add_generation_prompt exclude each other; give one")
    return ends and not new and old is not False


def _variables(fields: Fields) -> dict[str, Any]:
    variables = fields.object("chat_template_kwargs") or {}
    for name in variables:
        if not name.isidentifier() or name in ("messages", "tools", "add_generation_prompt"):
            fields.refuse("chat_template_kwargs", f"cannot have {name!r:.40}; leave it out")
    return variables


def _max_tokens(fields: Fields, chat: bool, echo: bool) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    given = [fields.integer(name, least=-1) for name in names]
    named = {value for value in given if value is not None}
    if len(named) > 1:
        fields.refuse("max_tokens", "and max_completion_tokens differ; give one")
    if not named:
        return None if chat else COMPLETION_MAX_TOKENS
    most = named.pop()
    if most == 0 and not echo:
        fields.refuse("max_tokens", "must be an integer of at least 1, or -1 for as many as there is room for")
    return None if most == -1 else most


def parse_stop(value: Any) -> list[str]:
    """Strings that end the text."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop must be a string or a list of at most {MOST_STOPS}, none of them empty", param="stop")
    if not all(map(encodable, stops)):
        raise RequestError("stop must be text; a lone surrogate is no character", param="stop")
    return stops


def _stop_tokens(fields: Fields) -> list[int]:
    value = fields.take("stop_token_ids")
    tokens = [] if value is None else value
    if not isinstance(tokens, list) or len(tokens) > MOST_STOP_TOKENS or not all(map(is_integer, tokens)):
        fields.refuse("stop_token_ids", f"must be a list of at most {MOST_STOP_TOKENS} ids")
    return tokens


def parse_sampling(fields: Fields) -> SamplingOptions:
    """Options of `make_sampler`; those left out are the model's."""
    options: SamplingOptions = {}
    for name, *others in (
        ["temperature"], ["top_p"], ["min_p"], ["repetition_penalty", "repeat_penalty"], ["presence_penalty"],
        ["frequency_penalty"],
    ):  # fmt: skip
        value = fields.number(name, *others)
        if value is not None:
            options[name] = value  # type: ignore[literal-required]
    top_k, seed = fields.integer("top_k", least=-1), fields.integer("seed", least=-(1 << 64))
    if top_k is not None:
        options["top_k"] = max(top_k, 0)  # -1 is all, to some
    if seed is not None:
        options["seed"] = seed % (1 << 64)
    bias = fields.object("logit_bias")
    if bias:
        if not all(token.isascii() and token.isdecimal() and len(token) < 12 for token in bias):
            fields.refuse("logit_bias", "must be of token ids, as strings of digits")
        if not all(map(is_number, bias.values())):
            fields.refuse("logit_bias", "must have numbers from -100 to 100")
        options["logit_bias"] = {int(token): float(value) for token, value in bias.items()}
    return options


def _top_logprobs(fields: Fields, chat: bool) -> int | None:
    if not chat:
        value = fields.take("logprobs")
        if value is True or (value is not None and not is_integer(value)):
            fields.refuse("logprobs", f"must be an integer of at least 0 and at most {MOST_COMPLETION_LOGPROBS}")
        fields.values["logprobs"] = None if value is False else value
        return fields.integer("logprobs", least=0, most=MOST_COMPLETION_LOGPROBS)
    wanted, top = fields.boolean("logprobs"), fields.integer("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
    if top and not wanted:
        fields.refuse("top_logprobs", "needs logprobs=true")
    return (top or 0) if wanted else None


def parse_settings(fields: Fields, defaults: Settings) -> Settings:
    """Settings of the session."""
    policy, kv_bits = fields.text("policy"), fields.number("kv_bits")
    if policy is None and kv_bits is None:
        return defaults
    # A policy or a budget of the request's own stands alone: half of the server's would make a third thing.
    return defaults._replace(policy=policy, kv_bits=kv_bits, kv_memory=None)


def texts_or_ids(value: Any, name: str, most: int) -> list[str | list[int]]:
    """The value of a field that is one text, one list of ids, or several of either.

    Raises:
        RequestError: it is something else, or more than `most`.
    """
    several = isinstance(value, list) and value and all(isinstance(each, str | list) for each in value)
    found = value if several else [value]
    if len(found) > most:
        raise RequestError(f"at most {most} {name}s are taken; send several requests", param=name)
    for each in found:
        ids = isinstance(each, list) and each and all(map(is_integer, each))
        if not (ids or (isinstance(each, str) and each)):
            raise RequestError(
                f"{name} must be a non-empty string or a list of token ids, or a list of these", param=name
            )
    return found
