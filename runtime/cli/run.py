"""``kvq-run``: an answer to a question, or text after a text; text to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.answers import Bar, why_empty
from kvq.runtime.cli.options import (
    CACHE,
    MODEL,
    RAW,
    SAMPLING,
    SETTINGS,
    SYSTEM,
    Command,
    given,
    load_model,
    option,
    options,
)
from kvq.runtime.cli.sessions import SESSION, Interrupt, SessionFile, conversation_of
from kvq.runtime.errors import PromptError

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation
    from kvq.runtime.session.generation import Response
    from kvq.runtime.session.session import Session

# Of stdin that stays open without a word, before the user is told what is waited for.
SECONDS_OF_SILENCE = 3


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
@options(SAMPLING)
@click.pass_context
def run(
    ctx, prompt, prompt_file, system, raw, model, session_file, session_readonly, policy, kv_bits, kv_memory, recent,
    sink, prefill, backend, threads, as_json, quiet, **generation,
) -> None:  # fmt: skip
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
      kvq-run -f notes.txt --kv-bits 3.5 --json "What is still to be done?"
      kvq-run "The ship left the harbour"
      kvq-run --session story.kvq "It was late"
    """
    if raw and system is not None:
        raise click.UsageError("--raw and --system exclude each other: there are no turns without the chat template")
    say = None if quiet or as_json else partial(click.echo, err=True)
    kept = SessionFile.of(session_file, session_readonly)
    parts = prompt_parts(prompt, prompt_file, joined=True, say=say)
    if not parts and not (kept is not None and kept.exists and prompt is None and prompt_file is None):
        raise PromptError(EMPTY)
    settings = {
        "policy": policy, "recent": recent, "sink": sink, "prefill": prefill, "backend": backend,
        "kv_bits": kv_bits, "kv_memory": kv_memory,
    }  # fmt: skip
    loaded = load_model(model, threads)
    session = loaded.session(**settings) if kept is None else kept.open(loaded, settings, given(ctx))
    conversation = conversation_of(session, system, raw)
    if kept is not None and say:
        say(kept.opened(session, conversation))
    if generation["max_tokens"] == -1:
        generation["max_tokens"] = None
    text = ("\n" if conversation is None else "\n\n").join(parts)
    bar = Bar(shown=say is not None)
    interrupt = Interrupt(enabled=kept is not None)
    with interrupt:
        asked = conversation is not None and bool(text or conversation.document)
        responses = ask(session, conversation, text, generation, bar)
        result, last = show(responses, echo=not as_json, bar=bar, interrupt=interrupt, strip=asked)
        if kept is not None:
            kept.close(session)
            result["session"] = kept.as_dict()
    empty = why_empty(result["text"], last, loaded, conversation.template if conversation else None, generation)
    tell(result | {"prompt": text, "template": conversation is not None, "empty": empty}, session, as_json, say)
    if kept is not None and say:
        say(kept.closed(session))
    if interrupt.asked:
        sys.exit(130)


def ask(
    session: Session, conversation: Conversation | None, text: str, generation: dict[str, Any], bar: Bar
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


def show(
    responses: Iterator[Response], echo: bool, bar: Bar, interrupt: Interrupt, strip: bool
) -> tuple[dict[str, Any], Response | None]:
    """Write what is generated to stdout as it comes, if `echo`; with `strip` without the blanks it begins with.

    Returns:
        text, tokens, finish_reason and seconds, and the last response.
    """
    begun = time.perf_counter()
    pieces: list[str] = []
    last, reason = None, None
    try:
        for last in responses:
            bar.clear()
            interrupt.arm()  # before any text is shown
            text = last.text.lstrip() if strip and not "".join(pieces) else last.text
            pieces.append(text)
            reason = last.finish_reason
            if echo:
                click.echo(text, nl=False)
                sys.stdout.flush()
            if interrupt.asked and reason is None:
                reason = "interrupted"
                break
    finally:
        bar.clear()
        responses.close()  # type: ignore[attr-defined] # a generator: ends its turn
        if echo and pieces:
            click.echo()
    tokens = 0 if last is None else last.index + 1
    seconds = round(time.perf_counter() - begun, 3)
    return {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, "seconds": seconds}, last


def tell(result: dict[str, Any], session: Session, as_json: bool, say: Callable[[str], None] | None) -> None:
    """What a run came to: one JSON object on stdout, or on stderr why there is no text, and the statistics."""
    if as_json:
        click.echo(json.dumps(result | {"stats": session.stats().as_dict()}, ensure_ascii=False))
    elif result["empty"] and (say or result["finish_reason"] == "stop"):  # who asks for one token and quiet knows
        click.echo(f"kvq: {result['empty']}", err=True)
    if say:
        say(f"{result['finish_reason']} after {result['tokens']} tokens | {session.stats().line()}")


EMPTY = 'the prompt is empty: give it as an argument (kvq-run "Once upon a time"), with --file, or on stdin'


def read_prompt(argument: str | None, file: Path | None) -> str:
    """A text from file or stdin, followed by the argument; stdin is read only if nothing else is given.

    Raises:
        PromptError: nothing given, unreadable, empty, or not UTF-8.
    """
    text = "\n".join(prompt_parts(argument, file, joined=False))
    if not text:
        raise PromptError(EMPTY)
    return text


def prompt_parts(
    argument: str | None, file: Path | None, joined: bool, say: Callable[[str], None] | None = None
) -> list[str]:
    """What stdin, the file and the argument hold, in this order, without the line ends behind; blank ones left out.

    Args:
        argument, file: None where not given; the file "-" is stdin.
        joined: whether stdin is read besides them too, unless it is a terminal.
        say: told if that takes long.

    Raises:
        PromptError: unreadable or not UTF-8.
    """
    parts = []
    named = argument is not None or file is not None
    if str(file) == "-" or ((joined or not named) and not sys.stdin.isatty()):
        parts.append(_utf8(_stdin(optional=named and str(file) != "-", say=say), "stdin"))
    if file is not None and str(file) != "-":
        try:
            parts.append(_utf8(file.read_bytes(), str(file)))
        except OSError as error:
            raise PromptError(f"cannot read {file}: {error.strerror}; check the path") from None
    if argument is not None:
        parts.append(argument_text(argument, "the prompt"))
    return [part.rstrip("\n") for part in parts if part.strip()]


def _stdin(optional: bool, say: Callable[[str], None] | None) -> bytes:
    """All of stdin; where it is optional, one that cannot be read, as nohup leaves it, is none."""
    if optional and say and sys.platform != "win32":  # where select knows sockets only
        try:
            if not select.select([sys.stdin], [], [], SECONDS_OF_SILENCE)[0]:
                say("kvq: waiting for the end of stdin, which goes before the prompt; </dev/null gives it none")
        except (OSError, ValueError):  # no file behind it
            pass
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        if not optional or error.errno != errno.EBADF:
            raise
        return b""


def argument_text(argument: str, what: str) -> str:
    """An argument, in whatever locale; undecodable bytes arrive as surrogates."""
    return _utf8(os.fsencode(argument), what)


def _utf8(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8") from None
