"""``kvq eval``: quality through the cache."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import click


@click.group("eval", context_settings={"help_option_names": ["-h", "--help"]})
def evaluate() -> None:
    """Measure quality through the cache: divergence from 16 bits, arms at equal bytes, tasks."""


def write_json(path: Path | None, value: object) -> None:
    """JSON to a file, complete or not at all; to stdout without one."""
    text = json.dumps(value, indent=1) + "\n"
    if path is None:
        click.echo(text, nl=False)
        return
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def bar():
    """A progress callback that draws on stderr once it is first called."""
    shown = None

    def progress(done: int, total: int, what: str) -> None:
        nonlocal shown
        if shown is None:
            shown = click.progressbar(length=100, file=sys.stderr)
            shown.__enter__()
        shown.label = what
        shown.update(100 * done // total - shown.pos)

    try:
        yield progress
    finally:
        if shown is not None:
            shown.__exit__(None, None, None)


def _numbers(text: str, option: str, kind: type = float) -> list:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{option} takes numbers with commas between them, got {text!r}") from None
    if any(not number > 0 for number in found):
        raise click.UsageError(f"{option} takes positive numbers, got {text!r}")
    return found


MODEL = click.option("-m", "--model", help="Bundle folder or embedded model; the default model if not given.")
TEXT = click.option("--text", "texts", required=True, multiple=True, type=click.Path(path_type=Path),
                    help="UTF-8 text to score; can be repeated.")  # fmt: skip
CONTEXT = click.option("--context", default="512", show_default=True, help="Tokens of a chunk; several with commas.")
CHUNKS = click.option("--chunks", "count", default=16, show_default=True, help="Chunks, spread over the texts.")
RECENT = click.option("--recent", default=16, show_default=True, help="Newest tokens at 16 bits, in every arm.")
THREADS = click.option("--threads", type=int, help="CPU threads; all available cores if not given.")
JSON = click.option("--json", "out", type=click.Path(path_type=Path), help="Write the result there; else to stdout.")


@evaluate.command()
@MODEL
@TEXT
@click.option("--bits", default="2.75,3.25,4.25", show_default=True, help="Budgets, total bits per value.")
@CONTEXT
@CHUNKS
@RECENT
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What the bundle was exported from: adds the "
              "oracle, which knows every token's damage (needs torch).")  # fmt: skip
@JSON
@click.option("--compare", "comparison", type=click.Path(path_type=Path), help="Write paired intervals there, as JSON.")
@THREADS
def pareto(model, texts, bits, context, count, recent, checkpoint, out, comparison, threads) -> None:
    """All arms at equal bytes: a list of rows with arm, bits and divergence."""
    import kvq
    from kvq.evaluation.pareto import chunks, compare, measure

    loaded = kvq.load(model, threads=threads)
    budgets, rows = _numbers(bits, "--bits"), []

    def write(found: list) -> None:
        write_json(out, found)
        if comparison is not None:
            write_json(comparison, compare(found))

    with bar() as progress:
        for length in _numbers(context, "--context", int):
            cut = chunks(loaded, list(texts), length, count)
            each = (lambda found, before=tuple(rows): write([*before, *found])) if out else None
            rows += measure(loaded, cut, budgets, recent, checkpoint, progress, each)
    write(rows)


@evaluate.command()
@MODEL
@TEXT
@click.option("-p", "--policy", "policies", multiple=True, default=("int8", "int4", "int2"), show_default=True)
@CONTEXT
@CHUNKS
@RECENT
@JSON
@THREADS
def kld(model, texts, policies, context, count, recent, out, threads) -> None:
    """Divergence of policies from 16 bits: mean, 99th percentile, same-top-1, perplexity, by context length."""
    import kvq
    from kvq.evaluation.kld import by_position, measure
    from kvq.evaluation.pareto import chunks

    loaded = kvq.load(model, threads=threads)
    rows = []
    with bar() as progress:
        for length in _numbers(context, "--context", int):
            found = measure(loaded, chunks(loaded, list(texts), length, count), list(policies), recent, progress)
            rows += by_position(found, length)
    write_json(out, rows)
