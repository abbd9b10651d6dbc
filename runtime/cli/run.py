"""``kvq-run``: text after a prompt; text to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.errors import BudgetError, PromptError
from kvq.runtime.sampling import DEFAULTS

if TYPE_CHECKING:
    from kvq.runtime.session import Session

# Names and short forms as in llama.cpp and mlx-lm.
SAMPLING = [
    click.option("-n", "--max-tokens", default=128, show_default=True, help="Most tokens; -1 fills the context."),
    click.option("-t", "--temperature", "--temp", default=DEFAULTS["temperature"], show_default=True,
                 help="0 is greedy."),
    click.option("--top-k", default=DEFAULTS["top_k"], show_default=True, help="Keep the k most likely; 0 is all."),
    click.option("--top-p", default=DEFAULTS["top_p"], show_default=True, help="Keep the fewest that reach p."),
    click.option("--min-p", default=DEFAULTS["min_p"], show_default=True,
                 help="Drop what is less than p times as likely as the best."),
    click.option("--repetition-penalty", "--repeat-penalty", default=DEFAULTS["repetition_penalty"], show_default=True,
                 help="1 is off."),
    click.option("-s", "--seed", type=int, help="Same seed, same text; drawn if not given."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT appears; can be repeated."),
    click.option("--stop-token", "stop_tokens", multiple=True, type=int, metavar="ID", help="End at a token id."),
    click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token."),
]  # fmt: skip
CACHE = [
    click.option("-p", "--policy", help="Precision of cached tokens: fp16, int8, int4, int2, k8v4 (any pair of "
                 "widths), mixed, random, rule, paper, adaptive; fp16 if not given, adaptive with a budget."),
    click.option("--kv-bits", type=float, metavar="X", help="Keep the cache to X bits per value, all told."),
    click.option("--kv-memory", metavar="SIZE", help="Keep the cache to that many bytes: 800kB, 8MB."),
    click.option("--recent", default=16, show_default=True, help="Newest tokens kept at 16 bits."),
    click.option("--sink", default=0, show_default=True, help="First tokens kept at 16 bits."),
    click.option("--backend", help="Attention backend; KVQ_BACKEND or the fastest if not given."),
]  # fmt: skip


def options(group: list):
    """Apply a list of click options in the order they are written."""

    def decorate(function):
        for option in reversed(group):
            function = option(function)
        return function

    return decorate


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompt", required=False)
@click.option(
    "-f", "--file", "prompt_file", type=click.Path(path_type=Path), help="Read the prompt from a file, - is stdin."
)
@click.option("-m", "--model", metavar="MODEL", help="Bundle folder or embedded model; the default model if not given.")
@options(CACHE)
@options(SAMPLING)
@click.option("--threads", type=int, help="CPU threads; all available cores if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text and statistics.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics line.")
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


def nbytes(text: str) -> float:
    """Bytes of a size such as "800kB", "8MB", "1 GiB" or a plain number; decimal units as storage is sold.

    Raises:
        BudgetError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmg]?)(i?)b?)\s*", text, re.IGNORECASE)
    if not match:
        raise BudgetError(f"{text!r} is not a size; write for example 800kB or 8MB")
    number, unit, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** " kmg".index(unit.lower() or " ")


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
