"""``kvq-run``: text after a prompt; text to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.options import CACHE, MODEL, SAMPLING, SETTINGS, Command, nbytes, option, options
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
@option("--json", "as_json", is_flag=True, section="Basics", help="Print one JSON object with text and statistics.")
@option("-q", "--quiet", is_flag=True, section="Basics", help="No statistics line.")
@options(MODEL)
@options(CACHE)
@options(SAMPLING)
def run(
    prompt, prompt_file, model, policy, kv_bits, kv_memory, recent, sink, backend, threads, as_json, quiet, **generation
) -> None:
    """Generate text after PROMPT.

    The prompt is the argument, a file, or stdin; a file given with an argument goes before it.

    \b
    Examples:
      kvq-run "The ship left the harbour"
      kvq-run -p mixed -n 60 -t 0 "Once upon a time"
      kvq-run -f notes.txt --policy int4 --json
      kvq-run -f notes.txt --kv-bits 3.5
      cat chapter.txt | kvq-run -q
    """
    import kvq  # onnxruntime and the rest load only now: --help stays quick

    text = read_prompt(prompt, prompt_file)
    memory = None if kv_memory is None else nbytes(kv_memory)
    session = kvq.load(model, threads=threads).session(
        policy, recent=recent, sink=sink, backend=backend, kv_bits=kv_bits, kv_memory=memory
    )
    if generation["max_tokens"] == -1:
        generation["max_tokens"] = None
    result = generate(session, text, generation, echo=not as_json)
    if as_json:
        click.echo(json.dumps(result | {"prompt": text, "stats": session.stats().as_dict()}, ensure_ascii=False))
    elif not quiet:
        click.echo(f"{result['finish_reason']} after {result['tokens']} tokens | {session.stats().line()}", err=True)


def generate(session: Session, prompt: str, generation: dict[str, Any], echo: bool) -> dict[str, Any]:
    """Generate, writing text to stdout as it comes if `echo`; returns text, tokens, finish_reason, seconds."""
    begun = time.perf_counter()
    pieces: list[str] = []
    tokens, reason = 0, None
    try:
        for response in session.generate(prompt, **generation):
            pieces.append(response.text)
            tokens, reason = response.index + 1, response.finish_reason
            if echo:
                click.echo(response.text, nl=False)
                sys.stdout.flush()
    finally:
        if echo and pieces:
            click.echo()
    seconds = round(time.perf_counter() - begun, 3)
    return {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, "seconds": seconds}


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from file or stdin, followed by the argument; stdin is read only if nothing else is given.

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
        raise PromptError(
            'the prompt is empty: give it as an argument (kvq-run "Once upon a time"), with --file, or on stdin'
        )
    return text


def _utf8(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8") from None
