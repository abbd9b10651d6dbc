"""An answer on its way to the user: its text as it comes, and why there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.interrupt import Interrupt
from kvq.runtime.cli.progress import Bar

if TYPE_CHECKING:
    from kvq.runtime.session.generation import Response
    from kvq.runtime.session.model import Model
    from kvq.runtime.text.template import ChatTemplate


@dataclass(frozen=True)
class Answer:
    """What came of a generation.

    Attributes:
        text: all of it.
        last: the last response; None if there was none.
        seconds: it took.
        interrupted: Ctrl-C has ended it.
    """

    text: str
    last: Response | None
    seconds: float
    interrupted: bool

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return 0 if self.last is None else self.last.index + 1

    @property
    def finish_reason(self) -> str | None:
        """As in `Response`, or "interrupted"; None if it did not come to an end."""
        if self.interrupted:
            return "interrupted"
        return None if self.last is None else self.last.finish_reason

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip


def show(responses: Iterator[Response], bar: Bar, interrupt: Interrupt, *, echo: bool = True, strip: bool) -> Answer:
    """Take the responses of a generation, and write their text to stdout as it comes; to a terminal what it can show.

    Args:
        responses: a generator, which is closed whatever happens.
        bar: of the prompt; cleared when the text begins.
        interrupt: ends it between two tokens.
        echo: without, nothing is written.
        strip: leave out the blanks that the text begins with.
    """
    from kvq.runtime.text.cells import visible  # with it tokenizers, which --help does without

    begun = time.perf_counter()
    pieces: list[str] = []
    last, interrupted = None, False
    # What a model says must not steer a terminal; a file gets it as it is.
    shown = visible if sys.stdout.isatty() else str
    try:
        for last in responses:
            bar.clear()
            interrupt.arm()  # before any text is shown
            pieces.append(last.text.lstrip() if strip and not any(pieces) else last.text)
            if echo:
                click.echo(shown(pieces[-1]), nl=False, color=True)  # without, click takes escapes out
                sys.stdout.flush()
            if interrupt.asked and last.finish_reason is None:
                interrupted = True
                break
    finally:
        bar.clear()
        responses.close()  # type: ignore[attr-defined] # a generator: ends its turn
        if echo and pieces:
            click.echo()
    return Answer("".join(pieces), last, time.perf_counter() - begun, interrupted)


def why_empty(
    text: str, last: Response | None, model: Model, template: ChatTemplate | None, generation: dict[str, Any]
) -> str | None:
    """Why an answer has nothing to show; None for one that has, or that was interrupted.

    Args:
        text: of the answer.
        last: its last response.
        model: it came from.
        template: that it was asked through, if through one.
        generation: options of `Session.generate`.
    """
    shown = text if template is None else text.strip()  # blanks are a text, but no answer
    if shown or last is None or last.finish_reason is None:
        return None
    what = "the text" if template is None else "its answer"
    tokens = last.index + 1
    count = f"{tokens} token{'s' * (tokens != 1)}"
    if last.finish_reason == "length":
        return f"nothing to show in {count}; -n sets how many"
    if last.finish_reason == "context":
        return f"the context of {model.architecture.context} tokens is full"
    ends = [*model.bundle.manifest.eos_token_ids, *(template.stop_tokens if template else ())]
    given = generation.get("stop_tokens", ())
    if last.token in given or (last.token in ends and not generation.get("ignore_eos")):
        tokenizer = model.optional_tokenizer
        name = (tokenizer.id_to_token(last.token) if tokenizer else None) or f"token {last.token}"
        when = "at once" if tokens == 1 else f"after {tokens - 1} without a word"
        hint = "" if template or last.token in given else ": it goes on with texts, and for it this one was complete"
        return f"the model ended {what} {when} ({name}){hint}"
    return f"the model began {what} with {_one_of([*(template.stop if template else ()), *generation.get('stop', ())])}"


def _one_of(stops: Sequence[str]) -> str:
    named = " or ".join(repr(stop) for stop in stops)
    return f"a stop string ({named})" if len(named) < 80 else "a stop string"
