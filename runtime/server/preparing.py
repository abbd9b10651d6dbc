"""From a request to its jobs: everything that can be refused before the queue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import ContextError, GrammarError, RequestError
from kvq.runtime.server.cached import CacheReader
from kvq.runtime.server.jobs import Job
from kvq.runtime.server.pool import SessionPool
from kvq.runtime.server.protocol import Generation
from kvq.runtime.server.room import Room, chat_ids
from kvq.runtime.session.drafting import AUTO, Draft
from kvq.runtime.session.generation import GenerationOptions
from kvq.runtime.session.sampling import SamplingOptions
from kvq.runtime.text.grammar import Grammar
from kvq.runtime.text.tools import forced_calls

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: most bytes of a body.
        body_s: seconds in which a body has to arrive.
        prompt_tokens: most tokens of a prompt; None leaves it to the model's context.
        max_tokens: most tokens of a text, and what a chat response has if the request names no number.
        timeout_s: seconds from the request to the end of its response.
        draft: as in `Session.generate`.
        context_shift: whether a full context makes room where a request does not say.
    """

    body: int = 4_000_000
    body_s: float = 30.0
    prompt_tokens: int | None = None
    max_tokens: int = 1024
    timeout_s: float = 600.0
    draft: Draft = AUTO
    context_shift: bool = False


@dataclass(frozen=True)
class Prepared:
    """A request in the model's terms.

    Attributes:
        request: what was asked.
        jobs: one a prompt, in order.
        ends: ids that end a text and are no part of it.
        stops: whether strings can end it: the tokens of one are no part of it either.
        most: tokens that a text may have, of the first prompt.
    """

    request: Generation
    jobs: list[Job]
    ends: frozenset[int]
    stops: bool
    most: int


def prepare(request: Generation, model: Model, pool: SessionPool, limits: Limits) -> Prepared:
    """The jobs of a request.

    Raises:
        RequestError: 413, it needs more memory than there is; a prompt or option that does not fit the model.
        ContextError: a prompt is too long.
        KvqError: as the library says of a template, a schema, a policy or a budget.
    """
    stop, stop_tokens = list(request.stop), list(request.stop_tokens)
    room = Room.of(request, model, limits.context_shift)
    if request.chat:
        prompts = [room.prompt(chat_ids(request, model))]
        stop += model.chat_template.stop
        stop_tokens += [] if request.ignore_eos else model.chat_template.stop_tokens
    else:
        prompts = [model.encode(each) if isinstance(each, str) else each for each in request.prompts]
    _check_ids(request, model)
    grammar = _grammar(request, model)
    context = model.architecture.context
    jobs: list[Job] = []
    most = 0
    for ids in prompts:
        array = _checked(ids, model, request, limits)
        wanted = limits.max_tokens if request.max_tokens is None else min(request.max_tokens, limits.max_tokens)
        tokens = wanted if room.made else min(wanted, context - len(array) + 1)
        length = min(len(array) + tokens, context)
        most = most or tokens
        texts = partial(_options, request, wanted, stop, stop_tokens, grammar, limits.draft)
        jobs.append(
            Job(
                array, request.settings, pool.check(request.settings, length, request.n), length,
                [texts(number) | room.option() for number in range(request.n)],
                first=len(jobs) * request.n, alternatives=request.top_logprobs or 0,
                scored=request.echo and request.top_logprobs is not None, silent=not tokens,
                place=int(not jobs), reader=CacheReader() if request.token_bits else None, removed=room.removed,
                strict=_repeatable({**model.sampling, **request.sampling}),
            )
        )  # fmt: skip
    eos = () if request.ignore_eos else model.bundle.manifest.eos_token_ids
    return Prepared(request, jobs, frozenset((*stop_tokens, *eos)), bool(stop), most)


def _grammar(request: Generation, model: Model) -> Grammar | None:
    """What the text is kept to."""
    tools, structure = request.tools, request.structure
    field = "response_format"
    if tools is not None and tools.forced:
        template = model.chat_template
        structure = forced_calls(template, template.calls, tools.offered, tools.parallel)
        field = "tools"
    if structure is None:
        return None
    try:
        return model.grammar(structure)
    except GrammarError as error:
        raise RequestError(str(error), param=field) from None


def _options(
    request: Generation,
    tokens: int,
    stop: list[str],
    stop_tokens: list[int],
    grammar: Grammar | None,
    draft: Draft,
    number: int,
) -> GenerationOptions:
    """Options of one text. The first has the request's seed, each further one the next."""
    options: GenerationOptions = {**request.sampling, "stop": stop, "stop_tokens": stop_tokens}
    options["max_tokens"], options["ignore_eos"], options["draft"] = tokens, request.ignore_eos, draft
    seed = options.get("seed")
    if seed is not None:
        options["seed"] = (seed + number) % (1 << 64)
    if grammar is not None:
        options["constraint"] = grammar.begin()
    return options


def _repeatable(sampling: SamplingOptions) -> bool:
    """Whether the same request is to get the same answer: a seed says how it is drawn, or nothing is drawn."""
    return sampling.get("seed") is not None or sampling.get("temperature") == 0 or sampling.get("top_k") == 1


def _checked(ids: list[int], model: Model, request: Generation, limits: Limits) -> np.ndarray:
    """int64 [tokens], at least one, of the model's vocabulary, and no more than there is room for."""
    if not ids:
        raise RequestError("the prompt has no tokens; give some text", param="messages" if request.chat else "prompt")
    array, vocab, context = np.asarray(ids), model.architecture.vocab, model.architecture.context
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocab:
        raise RequestError(f"token ids must be in [0, {vocab}); is this another model's tokenizer?", param="prompt")
    most = min(limits.prompt_tokens or context, context)
    if len(array) > most:
        raise ContextError(f"the prompt has {len(array)} tokens, at most {most} are possible; shorten it")
    return array.astype(np.int64)


def _check_ids(request: Generation, model: Model) -> None:
    """Raise RequestError for ids in options that are not the model's."""
    vocab, bias = model.architecture.vocab, request.sampling.get("logit_bias") or {}
    for name, ids in (("stop_token_ids", request.stop_tokens), ("logit_bias", list(bias))):
        if any(not 0 <= token < vocab for token in ids):
            raise RequestError(f"{name} must be of ids in [0, {vocab}); is this another model's?", param=name)
