"""Generation: two generators on top of each other, tokens below and text above."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from kvq.runtime.errors import GrammarError, PromptError, SamplingError, SessionError
from kvq.runtime.keywords import is_integer, listed
from kvq.runtime.session.adjusting import LogitsProcessor
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.drafting import AUTO, Draft
from kvq.runtime.session.sampling import Sampler, SamplingOptions, Scored, make_sampler, most_likely
from kvq.runtime.session.shifting import ContextShift, Shift, begin_anew, shift_of
from kvq.runtime.text.continuing import added_tokens
from kvq.runtime.text.decoder import FOLLOWED, StopMatcher, StreamingDecoder
from kvq.runtime.text.grammar import Constraint, Structure, structure_of

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session
    from kvq.runtime.text.template import ChatTemplate


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
        top_logprobs: the most likely tokens in its place and their log-probabilities, as many as asked for.
    """

    text: str
    token: int
    logprob: float
    index: int
    finish_reason: str | None = None
    top_logprobs: Sequence[Scored] = ()


# Tokens of a prompt that have been read, and all of them.
Progress = Callable[[int, int], None]
# Ids up to a generated token, that one included -> whether the text ends with it.
StoppingCriterion = Callable[[Sequence[int]], bool]


def generate_tokens(
    session: Session,
    ids: Sequence[int],
    sampler: Sampler,
    progress: Progress | None = None,
    draft: int | None = 0,
    max_tokens: int | None = None,
    shift: Shift | None = None,
) -> Iterator[Appending | tuple[int, float]]:
    """Yield (token, log-probability) without end; stops only when the context is full and nothing may go.

    draft: tokens to draft at a time, as `Drafter.most` gives it; max_tokens: more will not be asked for. With a `shift`
    the last place of the context stays free, so that a text that ends there can be gone on with.

    Before a token comes what has to be appended for it, unless a pass has computed it along with an earlier one:
    whoever asked has it run until it is finished, and goes on. The last yielded token is in `session.pending`: it is
    fed when the next one is asked for, or by the next append.
    """
    begun = len(session.tokens) + len(session.pending) + len(ids)
    if shift is not None and len(ids) > session.room:
        kept = shift([*session.tokens, *session.pending, *session.checked(ids, begun).tolist()], begun, len(ids))
        if len(kept.ids) <= session.model.architecture.context:  # else it is refused as without
            begun, ids = begin_anew(session, kept, len(ids)), ()
    elif shift is not None and session.pending and not len(ids) and session.room < 1:  # as where it was drawn
        begun = begin_anew(session, shift(session.tokens + session.pending, begun, 1))
    if len(ids) or session.pending:
        appending = Appending(session, ids if len(ids) else None, progress=progress)
        yield appending
        logits = appending.result
    elif session.last_logits is not None:
        logits = session.last_logits
    else:
        raise PromptError(_nothing(session))
    for said in itertools.count(1):
        token, logprob = sampler(logits, session.tokens)
        session.pending.append(token)
        changes = session.changes
        yield token, logprob
        if session.changes != changes or session.pending[-1:] != [token]:
            raise SessionError("the session's text was changed while it generated; begin another generation")
        if shift is not None and session.room < 1:
            begun = begin_anew(session, shift(session.tokens + session.pending, begun, 1))
        if session.room < 0:
            session.pending.clear()
            return
        following = session.drafter.next(draft, session.room if max_tokens is None else max_tokens - said)
        if isinstance(following, Appending):
            yield following
            following = following.result
        logits = following


class GenerationOptions(SamplingOptions, total=False):
    """The keyword options of `stream`."""

    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_tokens: Sequence[int] | None
    ignore_eos: bool
    schema: Any
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    constraint: Constraint | None
    draft: Draft
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    progress: Progress | None
    top_logprobs: int
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion]
    context_shift: ContextShift


def ending_as(template: ChatTemplate, options: Mapping[str, Any]) -> dict[str, Any]:
    """`stop` and `stop_tokens` of options, with what ends an answer in a chat template."""
    stop, ends = options.get("stop") or (), () if options.get("ignore_eos") else template.stop_tokens
    return {
        "stop": [*template.stop, *([stop] if isinstance(stop, str) else stop)],
        "stop_tokens": [*ends, *(options.get("stop_tokens") or ())],
    }


def stream(
    session: Session, prompt: str | Sequence[int] | None = None, **options: Unpack[GenerationOptions]
) -> Iterator[Response]:
    """Generate text after a prompt, in passes of the session's own; arguments and errors as of `events`."""
    return _alone(events(session, prompt, **options))


def _alone(generation: Iterator[Appending | Response]) -> Iterator[Response]:
    for event in generation:
        if isinstance(event, Appending):
            event.run()
        else:
            yield event


def events(
    session: Session,
    prompt: str | Sequence[int] | None = None,
    *,
    max_tokens: int | None = 256,
    stop: str | Sequence[str] | None = (),
    stop_tokens: Sequence[int] | None = (),
    ignore_eos: bool = False,
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Sequence[str] | None = None,
    constraint: Constraint | None = None,
    draft: Draft = AUTO,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
    progress: Progress | None = None,
    top_logprobs: int = 0,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] = (),
    context_shift: ContextShift = False,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[Appending | Response]:
    """Generate text after a prompt: a `Response` per token, and before it what has to be appended for it.

    Whoever asks for these has each `Appending` run until it is finished, alone or together with those of other
    sessions (`appending.run_pass`), before the next event; its logits are then what the token is drawn from.

    Args:
        session: where the text so far is cached; the prompt is appended to it.
        prompt: text, or token ids; None continues the cached text.
        max_tokens: most tokens to generate; None goes on until the context is full.
        stop: strings that end the text and are not part of it; one that is an added token ends it as that token, too.
        stop_tokens, ignore_eos: ids that end it, besides the model's end-of-text ids, or instead of them.
        schema, regex, grammar, choice: what a text is that ends by "stop" uncut, see `kvq.runtime.text.grammar`.
        constraint: the same, compiled: for this generation alone.
        draft: tokens drafted at a time: "auto" for as many as pay, "off", or how many; see `Drafter`.
        logits_processor: returns logits float32 [vocab] changed; called with the ids before and them. Or several.
        progress: as in `Session.append`, while the prompt is read.
        top_logprobs: how many of the most likely tokens to report in the place of each.
        stopping_criteria: called with the ids up to a token, that one included; true ends the text. Or several.
        context_shift: what becomes of a full context, see `kvq.runtime.session.shifting`; false: it ends the text.
        **sampling: options of `make_sampler`; those left out are `Model.sampling`.

    Raises:
        PromptError: the prompt is empty or holds ids outside the vocabulary.
        ContextError: the prompt does not fit.
        SamplingError: an option is out of range.
        GrammarError: the schema, regex, grammar or choice is not valid or cannot be held to.
    """
    _check_counts(session, max_tokens, top_logprobs)
    stop = _checked_stop(session, stop)
    stop_ids = _stop_ids(session, stop_tokens, ignore_eos) | _stops_that_are_tokens(session, stop)
    constraint = _constraint(session, structure_of(schema, regex, grammar, choice), constraint)
    options: SamplingOptions = {**session.model.sampling, **sampling}
    _check_bias(session, options.get("logit_bias"))
    mask = None if constraint is None else partial(constraint.mask, ends=list(stop_ids))
    sampler = make_sampler(**options, processors=_several(logits_processor), mask=mask)
    most, ids, shift = session.drafter.most(draft), _prompt_ids(session, prompt), shift_of(session, context_shift)
    tokens = partial(generate_tokens, session, ids, sampler, progress, most, max_tokens, shift)
    ends = Ends(max_tokens, stop, stop_ids, _several(stopping_criteria))
    return _stream(session, tokens, ends, constraint, int(top_logprobs), shifts=shift is not None)


def _constraint(session: Session, structure: Structure | None, constraint: Constraint | None) -> Constraint | None:
    if structure is None:
        return constraint
    if constraint is not None:
        raise GrammarError(f"constraint and {structure.kind} exclude each other; give one of them")
    return session.model.grammar(structure).begin()


class Ends(NamedTuple):
    """What ends a text, as `stream` has it."""

    max_tokens: int | None
    stop: Sequence[str]
    stop_ids: frozenset[int]
    criteria: Sequence[StoppingCriterion]


def _stream(
    session: Session,
    tokens: Callable[[], Iterator[Appending | tuple[int, float]]],
    ends: Ends,
    constraint: Constraint | None,
    top_logprobs: int,
    shifts: bool,
) -> Iterator[Appending | Response]:
    tokenizer = session.model.optional_tokenizer
    decoder = StreamingDecoder(tokenizer) if tokenizer else None
    matcher = StopMatcher(ends.stop)
    index = -1
    for event in tokens():
        if isinstance(event, Appending):
            yield event
            continue
        index, (token, logprob) = index + 1, event
        reason = None
        text = ""
        if decoder and not index:  # it has to know what the first token stands behind
            decoder.follow(session.tokens[-FOLLOWED:])
        if token in ends.stop_ids:
            reason = "stop"
        elif decoder:
            text = matcher.push(decoder.push(token))
            reason = "stop" if matcher.stopped else None
        if reason is None and constraint is not None:
            constraint.accept(token)
            reason = "stop" if constraint.finished else None
        if reason is None and any(ended([*session.tokens, *session.pending]) for ended in ends.criteria):
            reason = "stop"
        if reason is None and index + 1 == ends.max_tokens:
            reason = "length"
        if reason is None and session.room < 0 and not shifts:
            reason = "context"
        if reason and decoder and not matcher.stopped:
            if reason != "length":  # a character that "length" cuts is shown whole by the continuation
                text += matcher.push(decoder.flush())
            text += matcher.flush()
            reason = "stop" if matcher.stopped else reason
        logits = session.last_logits  # those the token was drawn from
        top = () if logits is None else most_likely(logits, top_logprobs)
        yield Response(text, token, logprob, index, reason, top)
        if reason:
            if session.room < 0:
                session.pending.clear()  # the token after a full context can never be fed
            return


def _checked_stop(session: Session, stop: str | Sequence[str] | None) -> list[str]:
    stop = () if stop is None else stop  # as clients of other software say that there is none
    stops = [stop] if isinstance(stop, str) else listed(stop)
    if stops is None:
        raise SamplingError(f"stop must be a string or several, got {stop!r:.60}")
    if not all(isinstance(text, str) and text for text in stops):
        raise SamplingError(f"stop strings must not be empty, got {stops!r:.60}; leave stop out to have none")
    if stops and session.model.optional_tokenizer is None:
        raise SamplingError("stop strings need a tokenizer, which this bundle lacks; give ids as stop_tokens")
    return stops


def _several(functions: Any) -> list[Any]:
    """One function, or several, as a list."""
    found = [functions] if callable(functions) else listed(functions)
    if found is None or not all(map(callable, found)):
        raise SamplingError("logits_processor and stopping_criteria must be functions, one or several")
    return found


def _check_counts(session: Session, max_tokens: int | None, top_logprobs: int) -> None:
    if max_tokens is not None and (not is_integer(max_tokens) or max_tokens < 1):
        raise SamplingError(f"max_tokens must be at least 1, an integer, got {max_tokens!r:.60}")
    vocab = session.model.architecture.vocab
    if not is_integer(top_logprobs) or not 0 <= top_logprobs <= vocab:
        raise SamplingError(f"top_logprobs must be an integer from 0 to {vocab}, got {top_logprobs!r:.60}")


def _check_bias(session: Session, bias: Mapping[int, float] | None) -> None:
    vocab = session.model.architecture.vocab
    if isinstance(bias, Mapping) and (foreign := [id for id in bias if is_integer(id) and id >= vocab]):
        raise SamplingError(f"logit_bias must be of ids in [0, {vocab}), got {foreign[0]!r:.40}")


def _prompt_ids(session: Session, prompt: str | Sequence[int] | None) -> Sequence[int]:
    """Token ids to append before the first sampled token."""
    if prompt is None:
        session.check_whole()
        if not session.pending and session.last_logits is None:
            raise PromptError(_nothing(session))
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


def _nothing(session: Session) -> str:
    """Why there is nothing to go on from."""
    if session.tokens:
        return (
            f"nothing to continue: the last append ended after {len(session.tokens)} tokens of the text; append the"
            " rest, or trim to so many"
        )
    return "nothing to continue: the session is empty; give a prompt"


def _stop_ids(session: Session, stop_tokens: Sequence[int] | None, ignore_eos: bool) -> frozenset[int]:
    found = listed(() if stop_tokens is None else stop_tokens)
    if found is None:
        raise SamplingError(f"stop_tokens must be token ids, got {stop_tokens!r:.60}; give a list of them")
    stop_tokens = found
    if not isinstance(ignore_eos, bool | np.bool_ | int | None):
        raise SamplingError(f"ignore_eos must be true or false, got {ignore_eos!r:.60}")
    eos = () if ignore_eos else session.model.bundle.manifest.eos_token_ids
    vocab = session.model.architecture.vocab
    if not all(map(is_integer, stop_tokens)):
        raise SamplingError(f"stop_tokens must be token ids, got {stop_tokens!r:.60}; give strings as stop")
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
