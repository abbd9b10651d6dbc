"""Generation: two generators on top of each other, tokens below and text above."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from kvq.runtime.errors import GrammarError, PromptError, SamplingError
from kvq.runtime.session.adjusting import LogitsProcessor
from kvq.runtime.session.drafting import AUTO, Draft
from kvq.runtime.session.sampling import DEFAULTS, Sampler, SamplingOptions, make_sampler
from kvq.runtime.text.continuing import added_tokens
from kvq.runtime.text.decoder import FOLLOWED, StopMatcher, StreamingDecoder
from kvq.runtime.text.grammar import Constraint, structure_of

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass(frozen=True)
class Response:
    """One step of a generation.

    Attributes:
        text: new text, possibly empty: a character may span tokens, a stop string is held back. A character that
            max_tokens cuts in two is left out; a generation that continues the text begins with it.
        token: the sampled id.
        logprob: its log-probability under the model, in nats.
        index: tokens generated before this one.
        finish_reason: None until the last response; then "stop" (end-of-text, a stop token or
            a stop string), "length" (max_tokens) or "context" (the context is full).
    """

    text: str
    token: int
    logprob: float
    index: int
    finish_reason: str | None = None


# Tokens of a prompt that have been read, and all of them.
Progress = Callable[[int, int], None]


def generate_tokens(
    session: Session,
    ids: Sequence[int],
    sampler: Sampler,
    progress: Progress | None = None,
    draft: int | None = 0,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, float]]:
    """Yield (token, log-probability) without end; stops only when the context is full.

    draft: tokens to draft at a time, as `Drafter.most` gives it; max_tokens: more will not be asked for.

    The last yielded token is in `session.pending`: it is fed when the next one is asked for, or
    by the next append.
    """
    if len(ids):
        logits = session.append(ids, progress=progress)
    elif session.pending:
        logits = session.append([session.pending.pop()])
    elif session.last_logits is not None:
        logits = session.last_logits
    else:
        raise PromptError("nothing to continue: the session is empty; give a prompt")
    for said in itertools.count(1):
        token, logprob = sampler(logits, session.tokens)
        session.pending.append(token)
        yield token, logprob
        if session.room < 0:
            session.pending.clear()
            return
        ahead = session.room if max_tokens is None else max_tokens - said - 1
        logits = session.drafter.append(session.pending.pop(), draft, ahead)


class GenerationOptions(SamplingOptions, total=False):
    """The keyword options of `stream`."""

    max_tokens: int | None
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    ignore_eos: bool
    schema: Any
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    constraint: Constraint | None
    draft: Draft
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    progress: Progress | None


def stream(
    session: Session,
    prompt: str | Sequence[int] | None = None,
    *,
    max_tokens: int | None = 256,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    ignore_eos: bool = False,
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Sequence[str] | None = None,
    constraint: Constraint | None = None,
    draft: Draft = AUTO,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
    progress: Progress | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[Response]:
    """Generate text after a prompt.

    Args:
        session: where the text so far is cached; the prompt is appended to it.
        prompt: text, or token ids; None continues the cached text.
        max_tokens: most tokens to generate; None goes on until the context is full.
        stop: strings that end the text and are not part of it; one that is an added token ends it as that token, too.
        stop_tokens: ids that end it, besides the model's end-of-text ids.
        ignore_eos: do not end at the model's end-of-text ids.
        schema, regex, grammar, choice: what the generated text has to be, see `kvq.runtime.text.grammar`; it is so
            where it ends by "stop" and no stop string has cut it.
        constraint: the same, compiled: for this generation alone.
        draft: tokens drafted at a time: "auto" for as many as pay, "off", or how many; see `Drafter`.
        logits_processor: called with the ids before each token and the logits float32 [vocab], which it returns
            changed; or several.
        progress: as in `Session.append`, while the prompt is read.
        **sampling: options of `make_sampler`; those left out are `sampling.DEFAULTS`.

    Raises:
        PromptError: the prompt is empty or holds ids outside the vocabulary.
        ContextError: the prompt does not fit.
        SamplingError: an option is out of range.
        GrammarError: the schema, regex, grammar or choice is not valid or cannot be held to.
    """
    _check_max_tokens(max_tokens)
    stop = _checked_stop(session, stop)
    stop_ids = _stop_ids(session, stop_tokens, ignore_eos) | _stops_that_are_tokens(session, stop)
    structure = structure_of(schema, regex, grammar, choice)
    if structure is not None:
        if constraint is not None:
            raise GrammarError(f"constraint and {structure.kind} exclude each other; give one of them")
        constraint = session.model.grammar(structure).begin()
    options: SamplingOptions = {**DEFAULTS, **sampling}
    _check_bias(session, options.get("logit_bias"))
    sampler = make_sampler(
        **options,
        processors=[logits_processor] if callable(logits_processor) else list(logits_processor),
        mask=None if constraint is None else partial(constraint.mask, ends=list(stop_ids)),
    )
    most = session.drafter.most(draft)
    ids = _prompt_ids(session, prompt)
    tokens = partial(generate_tokens, session, ids, sampler, progress, most, max_tokens)
    return _stream(session, tokens, max_tokens, stop, stop_ids, constraint)


def _stream(
    session: Session,
    tokens: Callable[[], Iterator[tuple[int, float]]],
    max_tokens: int | None,
    stop: Sequence[str],
    stop_ids: frozenset[int],
    constraint: Constraint | None,
) -> Iterator[Response]:
    tokenizer = session.model.optional_tokenizer
    decoder = StreamingDecoder(tokenizer) if tokenizer else None
    matcher = StopMatcher(stop)
    for index, (token, logprob) in enumerate(tokens()):
        reason = None
        text = ""
        if decoder and not index:  # it has to know what the first token stands behind
            decoder.follow(session.tokens[-FOLLOWED:])
        if token in stop_ids:
            reason = "stop"
        elif decoder:
            text = matcher.push(decoder.push(token))
            reason = "stop" if matcher.stopped else None
        if reason is None and constraint is not None:
            constraint.accept(token)
            reason = "stop" if constraint.finished else None
        if reason is None and index + 1 == max_tokens:
            reason = "length"
        if reason is None and session.room < 0:
            reason = "context"
        if reason and decoder and not matcher.stopped:
            if reason != "length":  # a character that "length" cuts is shown whole by the continuation
                text += matcher.push(decoder.flush())
            text += matcher.flush()
            reason = "stop" if matcher.stopped else reason
        yield Response(text, token, logprob, index, reason)
        if reason:
            if session.room < 0:
                session.pending.clear()  # the token after a full context can never be fed
            return


def _check_max_tokens(most: int | None) -> None:
    if most is not None and (not isinstance(most, int | np.integer) or isinstance(most, bool) or most < 1):
        raise SamplingError(f"max_tokens must be at least 1, an integer, got {most!r:.60}")


def _checked_stop(session: Session, stop: str | Sequence[str]) -> list[str]:
    if not isinstance(stop, str | Iterable):
        raise SamplingError(f"stop must be a string or several, got {stop!r:.60}")
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise SamplingError(f"stop strings must not be empty, got {stops!r}; leave stop out to have none")
    if stops and session.model.optional_tokenizer is None:
        raise SamplingError("stop strings need a tokenizer, which this bundle lacks; give ids as stop_tokens")
    return stops


def _check_bias(session: Session, bias: Mapping[int, float] | None) -> None:
    vocab = session.model.architecture.vocab
    if isinstance(bias, Mapping) and (foreign := [id for id in bias if isinstance(id, int) and id >= vocab]):
        raise SamplingError(f"logit_bias must be of ids in [0, {vocab}), got {foreign[0]!r:.40}")


def _prompt_ids(session: Session, prompt: str | Sequence[int] | None) -> Sequence[int]:
    """Token ids to append before the first sampled token."""
    if prompt is None:
        if not session.pending and session.last_logits is None:
            raise PromptError("nothing to continue: the session is empty; give a prompt")
        return ()
    if isinstance(prompt, str):
        held = session.pending or session.tokens
        prompt = session.model.encode(prompt, beginning=not session.tokens, before=held[-1] if held else None)
    try:
        empty = not len(prompt)
    except TypeError:
        raise PromptError(f"the prompt must be text or token ids, got {prompt!r:.60}") from None
    if empty:
        raise PromptError("the prompt is empty: give some text")
    return prompt


def _stop_ids(session: Session, stop_tokens: Sequence[int], ignore_eos: bool) -> frozenset[int]:
    eos = () if ignore_eos else session.model.bundle.manifest.eos_token_ids
    vocab = session.model.architecture.vocab
    if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in stop_tokens):
        raise SamplingError(f"stop_tokens must be token ids, got {list(stop_tokens)!r}; give strings as stop")
    if foreign := [int(token) for token in stop_tokens if not 0 <= token < vocab]:
        raise SamplingError(f"stop_tokens must be ids in [0, {vocab}), got {foreign[0]}: the model never says it")
    return frozenset(int(token) for token in (*stop_tokens, *eos))


def _stops_that_are_tokens(session: Session, stop: Sequence[str]) -> frozenset[int]:
    """Ids of the stop strings that are added tokens: special ones give no text that a string could be found in."""
    tokenizer = session.model.optional_tokenizer
    if not stop or tokenizer is None:
        return frozenset()
    added = added_tokens(tokenizer)
    return frozenset(added[text] for text in stop if text in added)
