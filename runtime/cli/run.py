"""``kvq-run``: text after a prompt; text to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.options import (
    CACHE,
    MODEL,
    SAMPLING,
    SETTINGS,
    Command,
    given,
    load_model,
    option,
    options,
)
from kvq.runtime.cli.sessions import SESSION, Interrupt, SessionFile
from kvq.runtime.errors import PromptError

if TYPE_CHECKING:
    from kvq.runtime.session import Session


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("prompt", required=False)
@option(
    "-f",
    "--file",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section="Basics",
    help="Read the prompt from a file, - is stdin.",
)
@options(SESSION)
@option("--json", "as_json", is_flag=True, section="Basics", help="Print one JSON object with text and statistics.")
@option("-q", "--quiet", is_flag=True, section="Basics", help="No statistics line.")
@options(MODEL)
@options(CACHE)
@options(SAMPLING)
@click.pass_context
def run(
    ctx, prompt, prompt_file, model, session_file, session_readonly, policy, kv_bits, kv_memory, recent, sink, prefill,
    backend, threads, as_json, quiet, **generation,
) -> None:  # fmt: skip
    """Generate text after PROMPT.

    The prompt is the argument, a file, or stdin; a file given with an argument goes before it.
    A session goes on after the text it holds, without a prompt too.

    \b
    Examples:
      kvq-run "The ship left the harbour"
      kvq-run -p mixed -n 60 -t 0 "Once upon a time"
      kvq-run -f notes.txt --policy int4 --json
      kvq-run -f notes.txt --kv-bits 3.5
      cat chapter.txt | kvq-run -q
      kvq-run --session story.kvq "It was late"
    """
    kept = SessionFile.of(session_file, session_readonly)
    text = read_prompt(prompt, prompt_file, optional=kept is not None and kept.exists)
    settings = {
        "policy": policy, "recent": recent, "sink": sink, "prefill": prefill, "backend": backend,
        "kv_bits": kv_bits, "kv_memory": kv_memory,
    }  # fmt: skip
    loaded = load_model(model, threads)
    session = loaded.session(**settings) if kept is None else kept.open(loaded, settings, given(ctx))
    say = None if quiet or as_json else partial(click.echo, err=True)
    if kept is not None and say:
        say(kept.opened(session))
    if generation["max_tokens"] == -1:
        generation["max_tokens"] = None
    interrupt = Interrupt(enabled=kept is not None)
    with interrupt:
        result = generate(session, text or None, generation, echo=not as_json, interrupt=interrupt)
        if kept is not None:
            kept.close(session)
            result["session"] = kept.as_dict()
    if as_json:
        click.echo(json.dumps(result | {"prompt": text, "stats": session.stats().as_dict()}, ensure_ascii=False))
    elif say:
        say(f"{result['finish_reason']} after {result['tokens']} tokens | {session.stats().line()}")
        if kept is not None:
            say(kept.closed(session))
    if interrupt.asked:
        sys.exit(130)


def generate(
    session: Session,
    prompt: str | None,
    generation: dict[str, Any],
    echo: bool,
    interrupt: Interrupt | None = None,
) -> dict[str, Any]:
    """Generate, writing text to stdout as it comes if `echo`; returns text, tokens, finish_reason, seconds."""
    begun = time.perf_counter()
    pieces: list[str] = []
    tokens, reason = 0, None
    try:
        for response in session.generate(prompt, **generation):
            if interrupt:
                interrupt.arm()  # before any text is shown
            pieces.append(response.text)
            tokens, reason = response.index + 1, response.finish_reason
            if echo:
                click.echo(response.text, nl=False)
                sys.stdout.flush()
            if interrupt and interrupt.asked and reason is None:
                reason = "interrupted"
                break
    finally:
        if echo and pieces:
            click.echo()
    seconds = round(time.perf_counter() - begun, 3)
    return {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, "seconds": seconds}


def read_prompt(argument: str | None, file: Path | None, optional: bool = False) -> str:
    """The prompt from file or stdin, followed by the argument; stdin is read only if nothing else is given.

    Where it is optional, "" if there is none.

    Raises:
        PromptError: nothing given, unreadable, empty, or not UTF-8.
    """
    parts = []
    if file is not None and str(file) != "-":
        try:
            parts.append(_utf8(file.read_bytes(), str(file)))
        except OSError as error:
            raise PromptError(f"cannot read {file}: {error.strerror}; check the path given with --file") from None
    elif file is not None or (argument is None and not sys.stdin.isatty()):
        parts.append(_utf8(sys.stdin.buffer.read(), "stdin"))
    if argument is not None:
        parts.append(_utf8(os.fsencode(argument), "the prompt"))  # undecodable bytes arrive as surrogates
    text = "\n".join(part.rstrip("\n") for part in parts)
    if not text.strip():
        if optional and argument is None and file is None:
            return ""
        raise PromptError(
            'the prompt is empty: give it as an argument (kvq-run "Once upon a time"), with --file, or on stdin'
        )
    return text


def _utf8(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8") from None
