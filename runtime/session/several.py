"""Many prompts, several at a time in shared passes; what all of them begin with is processed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvq.runtime.errors import GrammarError, KvqError
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import Response, events

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

PARALLEL = 8  # texts at work where none depends on how many are


@dataclass(frozen=True)
class Completion:
    """What a prompt was gone on with.

    Attributes:
        index: of the prompt.
        text: all of it.
        responses: its tokens.
    """

    index: int
    text: str
    responses: list[Response] = field(repr=False)

    @property
    def finish_reason(self) -> str | None:
        """As in `Response`."""
        return self.responses[-1].finish_reason if self.responses else None


def texts_at_a_time(session: Session) -> int:
    """`PARALLEL` where a text is to the bit the same whatever texts share its passes, else 1."""
    backend, engine = session.backend, session.model.engine
    return PARALLEL if backend.rows_alike and engine.rows_alike(backend.joins[1]) else 1


def alike_however_fed(session: Session) -> bool:
    """Whether what a session stores and says is to the bit the same however tokens are fed, see docs/stepwise.md."""
    return session.stepwise and session.budget is None and texts_at_a_time(session) > 1


def of_prompt(index: int, error: Exception) -> Exception:
    """The error of one of several prompts, which it names: the first is number 0, as `Completion.index` has it."""
    return type(error)(f"prompt {index}: {error}") if isinstance(error, KvqError) else error


class _Text:
    """A prompt at work.

    Args:
        session: where its text is cached.
        ids: of it, without those that are cached already.
        options: of `Session.generate`.

    Attributes:
        next: what has to be appended for its next token; None when it has ended.
        responses: its tokens so far.
        error: that it came to, if any.
    """

    def __init__(self, session: Session, ids: Sequence[int], options: dict[str, Any]) -> None:
        self.next: Appending | None = None
        self.responses: list[Response] = []
        self.error: Exception | None = None
        try:
            self._events = events(session, ids, **options)
        except Exception as error:
            self.error = error
        else:
            self.go_on()

    def go_on(self) -> None:
        """Take tokens until something has to be appended for the next one."""
        try:
            for event in self._events:
                if isinstance(event, Appending):
                    self.next = event
                    return
                self.responses.append(event)
        except Exception as error:
            self.error = error
        self.next, self._events = None, iter(())  # nothing holds the session any more

    def passed(self, error: Exception | None) -> None:
        """A pass over `next` has run."""
        if error is not None:
            self.next, self.error, self._events = None, error, iter(())
        elif self.next is not None and self.next.finished:
            self.go_on()


def complete_all(
    model: Model, prompts: Sequence[Sequence[int]], settings: dict[str, Any], generations: Sequence[dict[str, Any]]
) -> Iterator[Completion]:
    """Go on with prompts, `texts_at_a_time` in shared passes; what all of them begin with is processed once.

    Each text is the one that the prompt alone would get: what is shared are whole chunks of the prefill, and passes in
    which a row is what it is alone. The first has the `seed`, each further one the next number. An error of one is
    raised in its place, behind those before it.

    Args:
        model: the loaded model.
        prompts: token ids of each.
        settings: of the sessions.
        generations: options of `Session.generate`, of each.

    Raises:
        GrammarError: a `constraint`, which is of one text.
    """
    if any(generation.get("constraint") is not None for generation in generations):
        raise GrammarError("constraint is of one text; give schema, regex, grammar or choice")
    first = model.session(**settings)
    chunk, most = first.prefill_chunk, texts_at_a_time(first)
    # One token at least is left to each, to give logits; a budget counts to the end of the call that appends.
    common = 0 if first.budget is not None or len(prompts) < 2 else _shared(prompts) // chunk * chunk
    if common:
        first.append(prompts[0][:common])

    def begun(index: int) -> _Text:
        session = first.fork() if common else model.session(**settings)
        options, seed = generations[index], generations[index].get("seed")
        return _Text(session, prompts[index][common:], options if seed is None else {**options, "seed": seed + index})

    texts: dict[int, _Text] = {}
    following = 0
    for index in range(len(prompts)):
        while index not in texts or texts[index].next is not None:
            at_work = [(text, text.next) for text in texts.values() if text.next is not None]
            if len(at_work) < most and following < len(prompts):
                texts[following] = begun(following)
                following += 1
                continue
            for (text, _), error in zip(at_work, model.run_pass([each for _, each in at_work]), strict=True):
                text.passed(error)
        done = texts.pop(index)
        if done.error is not None:
            raise of_prompt(index, done.error) from done.error.__cause__
        yield Completion(index, "".join(response.text for response in done.responses), done.responses)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, the last one of the shortest left out."""
    length = min(map(len, prompts)) - 1
    return next((i for i in range(length) if len({prompt[i] for prompt in prompts}) > 1), max(0, length))
