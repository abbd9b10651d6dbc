"""``kvq-run``: an answer to a question, or text after a text; text to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.answers import Answer, show, why_empty
from kvq.runtime.cli.interrupt import Interrupt
from kvq.runtime.cli.loading import load_model
from kvq.runtime.cli.options import (
    CACHE,
    CONTEXT_SHIFT,
    MODEL,
    RAW,
    SAMPLING,
    SETTINGS,
    STRUCTURE,
    SYSTEM,
    Command,
    generation_options,
    given,
    option,
    options,
    session_settings,
)
from kvq.runtime.cli.progress import Bar
from kvq.runtime.cli.questions import EMPTY, prompt_parts
from kvq.runtime.cli.sessions import SESSION, SessionFile, conversation_of
from kvq.runtime.errors import PromptError, one_line

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation
    from kvq.runtime.session.generation import Response
    from kvq.runtime.session.session import Session


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("prompt", required=False)
@option(
    "-f",
    "--file",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section="Basics",
    help="Read a text that goes before PROMPT from a file, - is stdin.",
)
@options([SYSTEM, RAW, *SESSION])
@option("--json", "as_json", is_flag=True, section="Basics", help="Print one JSON object with text and statistics.")
@option("-q", "--quiet", is_flag=True, section="Basics", help="No progress, no statistics line.")
@options(MODEL)
@options(CACHE)
@options(STRUCTURE)
@options([*SAMPLING, CONTEXT_SHIFT])
@click.pass_context
def run(
    ctx, prompt, prompt_file, system, raw, model, session_file, session_readonly, threads, as_json, quiet, **parameters
) -> None:
    """Answer PROMPT, or go on with it as a text.

    A model that has a chat template is asked: PROMPT is the user's turn. A model
    without one, or with --raw, goes on with the text.

    Text on stdin and in a file goes before the argument, in this order, set off
    by a blank line from a question. Like any filter kvq-run reads stdin to its
    end, unless it is a terminal; in a script's loop give it </dev/null.

    A session goes on after what it holds: in a conversation PROMPT is the next
    question, and without one a cut answer goes on.

    \b
    Examples:
      kvq-run -m smollm2-135m-instruct "What is the capital of France?"
      cat report.txt | kvq-run -m ./my-bundle "Summarise this in three sentences."
      git diff | kvq-run -m ./my-bundle --system "You review code." "Any bugs?"
      kvq-run --session lease.kvq --session-readonly "When is the rent due?"
      kvq-run --choice yes --choice no "Is a whale a fish?"
      kvq-run -f notes.txt --kv-bits 3.5 --json "What is still to be done?"
      kvq-run "The ship left the harbour"
      kvq-run --session story.kvq "It was late"
    """
    if raw and system is not None:
        raise click.UsageError("--raw and --system exclude each other: there are no turns without the chat template")
    say = None if quiet or as_json else _tell
    kept = SessionFile.of(session_file, session_readonly)
    parts = prompt_parts(prompt, prompt_file, joined=True, say=say)
    if not parts and not (kept is not None and kept.exists and prompt is None and prompt_file is None):
        raise PromptError(EMPTY)
    settings = session_settings(parameters)
    generation = generation_options(parameters)
    loaded = load_model(model, threads)
    session = loaded.session(**settings) if kept is None else kept.open(loaded, settings, given(ctx))
    conversation = conversation_of(session, system, raw)
    if kept is not None and say:
        say(kept.opened(session, conversation))
    text = ("\n" if conversation is None else "\n\n").join(parts)
    bar = Bar(shown=say is not None)
    with Interrupt(enabled=kept is not None) as interrupt:
        asked = conversation is not None and bool(text or conversation.document)
        responses = responses_to(text, session, conversation, generation, bar)
        answer = show(responses, bar, interrupt, echo=not as_json, strip=asked)
        if kept is not None:
            kept.close(session)
    template = conversation.template if conversation else None
    empty = why_empty(answer.text, answer.last, loaded, template, generation)
    if as_json:
        click.echo(_as_json(answer, kept, session, text, template is not None, empty))
    else:
        _report(answer, kept, session, empty, say)
    if interrupt.asked:
        sys.exit(130)


def responses_to(
    text: str, session: Session, conversation: Conversation | None, generation: dict[str, Any], bar: Bar
) -> Iterator[Response]:
    """The responses to a text: of the conversation, where there is one, else what goes on after it.

    Raises:
        PromptError: there is neither a text nor a cut one to go on with.
    """
    if conversation is None:
        return session.generate(text or None, progress=bar, **generation)
    if text or conversation.document:
        return conversation.reply(text, progress=bar, **generation)
    return conversation.resume(**generation)


def _as_json(
    answer: Answer, kept: SessionFile | None, session: Session, prompt: str, template: bool, empty: str | None
) -> str:
    """One JSON object; template: whether it was asked through a chat template."""
    found = answer.as_dict()
    if kept is not None:
        found["session"] = kept.as_dict()
    found |= {"prompt": prompt, "template": template, "empty": empty, "stats": session.stats().as_dict()}
    from kvq.runtime.text.cells import escaped

    return escaped(json.dumps(found, ensure_ascii=False))  # the same on a terminal as in a file


def _tell(text: str) -> None:
    """A line on stderr: names of files and of tokens in it must not steer the terminal."""
    click.echo(one_line(text), err=True)


def _report(
    answer: Answer, kept: SessionFile | None, session: Session, empty: str | None, say: Callable[[str], None] | None
) -> None:
    """What the user is told behind the text; say: None where little is wanted."""
    if empty and (say or answer.finish_reason == "stop"):  # who asks for one token and quiet knows
        _tell(f"kvq: {empty}")
    if say:
        say(f"{answer.finish_reason} after {answer.tokens} tokens | {session.stats().line()}")
        if kept is not None:
            say(kept.closed(session))
