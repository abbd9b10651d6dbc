"""``kvq eval``: quality through the cache."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from kvq.controller.evaluation.cli.options import (
    BUDGETS,
    CHUNKS,
    CONTEXT,
    EXACT,
    JSON,
    MODEL,
    MOST_ITEMS,
    PROTECT,
    PROTECT_EQUAL,
    RECENT,
    SEED,
    SINK,
    TEXT,
    arms_of,
    bar,
    numbers,
    protected,
    say,
    write_json,
    write_rows,
)
from kvq.controller.evaluation.cli.tasks import paper_table, tasks
from kvq.controller.evaluation.haystack import KINDS, MOST
from kvq.runtime.cli.interrupt import Leaving
from kvq.runtime.cli.loading import load_model
from kvq.runtime.cli.options import OUTPUT
from kvq.runtime.cli.questions import MOST_TEXT
from kvq.runtime.files import read_bounded


@click.group("eval", context_settings={"help_option_names": ["-h", "--help"]})
def evaluate() -> None:
    """Measure quality through the cache: divergence from 16 bits, arms at equal bytes, tasks."""


evaluate.add_command(tasks)
evaluate.add_command(paper_table)


@contextmanager
def _evaluated(model: str | None, threads: int | None, exact: bool) -> Iterator:
    """The model that -m names; with `exact`, a copy of it whose products keep their activations in float32."""
    loaded = load_model(model, threads)
    if not exact:
        yield loaded
        return
    from kvq.exporter.exact import exact_copy

    with Leaving(), tempfile.TemporaryDirectory(prefix="kvq-exact-") as folder:
        exact_copy(loaded.bundle.path, Path(folder))
        yield load_model(folder, threads)


def _of(model, rows: list[dict]) -> list[dict]:
    """The rows with the precision of the activations they were measured at."""
    return [row | {"activations": model.bundle.manifest.weights.get("activations")} for row in rows]


@evaluate.command()
@MODEL
@TEXT
@click.option("--bits", default="3,3.25,4.25", show_default=True, help="Budgets, total bits per value.")
@CONTEXT
@CHUNKS
@RECENT
@SINK
@PROTECT_EQUAL
@EXACT
@click.option("--oracle", is_flag=True, help="Add the arm that knows every token's damage (needs torch).")
@click.option(
    "--arms", help="Only these, with commas; their rows go beside others of the same texts in kvq eval report."
)
@JSON
@click.option("--compare", "comparison", **OUTPUT, help="Write paired intervals there, as JSON.")
def pareto(
    model, texts, bits, context, count, recent, sink, protect_bits, exact, oracle, arms, out, comparison, threads
) -> None:
    """All arms at equal bytes: a list of rows with arm, bits and divergence."""
    from kvq.controller.evaluation.pareto import ARMS, chunks, compare, measure

    wanted = ARMS if arms is None else tuple(arms.split(","))
    unknown = [arm for arm in wanted if arm not in ARMS]
    if unknown:
        raise click.UsageError(f"--arms takes {', '.join(ARMS)} with commas between them, got {', '.join(unknown)!r}")
    if "shuffled" in wanted and "adaptive" not in wanted:
        raise click.UsageError("--arms shuffled needs adaptive, whose precisions it shuffles; give both")
    if not oracle and arms is None:
        wanted = tuple(arm for arm in wanted if arm != "oracle")
    rows: list[dict] = []
    with _evaluated(model, threads, exact) as loaded:

        def write(found: list) -> None:
            write_json(out, _of(loaded, found))
            if comparison is not None:
                write_json(comparison, compare(found))

        if "oracle" in wanted:
            import torch

            torch.set_num_threads(loaded.engine.threads)  # of the oracle's measurements
        budgets = numbers(bits, "--bits")
        cuts = [chunks(loaded, list(texts), length, count) for length in numbers(context, "--context", int)]
        with bar() as progress:
            for cut in cuts:
                each = (lambda found, before=tuple(rows): write([*before, *found])) if out else None
                rows += measure(loaded, cut, budgets, recent, sink, protect_bits, wanted, progress, each)
        write(rows)


@evaluate.command()
@MODEL
@TEXT
@click.option("-p", "--policy", "policies", multiple=True, default=("int8", "int4", "int2"), show_default=True)
@BUDGETS
@CONTEXT
@CHUNKS
@RECENT
@SINK
@PROTECT_EQUAL
@EXACT
@click.option("--peer", type=click.Choice(["llama.cpp"]), help="Add its caches, each against its own 16-bit one.")
@click.option("--gguf", type=click.Path(path_type=Path), help="The GGUF file that the model was made from, for --peer.")
@click.option("--cache-type", "kinds", default="q8_0,q5_1,q4_1,q4_0", show_default=True,
              help="Types of the peer's keys and values, with commas.")  # fmt: skip
@JSON
def kld(
    model, texts, policies, kv_bits, context, count, recent, sink, protect_bits, exact, peer, gguf, kinds, out, threads
) -> None:
    """Divergence of policies from 16 bits: mean, 99th percentile, same-top-1, perplexity, by context length.

    With --peer the caches of llama.cpp get the same token ids, all of them at one type, without window and sink; the
    model's own arms keep theirs. "bits" are those of the whole text per value.

    The first row of an arm is that of whole texts, the others are parts of it, by "positions". With --json FILE a table
    goes to stdout, which kvq eval report writes too.

    \b
    Example:
      kvq eval kld -m smollm2-135m-instruct --text held-out.txt -p int8 -p int4 \\
          --peer llama.cpp --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from kvq.controller.evaluation.kld import by_position, measure
    from kvq.controller.evaluation.pareto import chunks
    from kvq.controller.evaluation.report import kld_table

    rows: list[dict] = []
    with _evaluated(model, threads, exact) as loaded, bar() as progress:
        other = _peer(peer, gguf, kinds, loaded)
        protection = protected(recent, sink, protect_bits)
        arms = [(name, options.get("kv_bits")) for name, options in arms_of(loaded, policies, kv_bits, protection)]
        for length in numbers(context, "--context", int):
            cut = chunks(loaded, list(texts), length, count)
            found = measure(loaded, cut, arms, recent, sink, protect_bits, other, progress)
            rows += by_position(found, length)
        rows = _of(loaded, rows)
    write_rows(out, rows, kld_table)


def _peer(peer: str | None, gguf: Path | None, kinds: str, model):
    """The other runtime's caches; None without --peer."""
    if peer is None:
        if gguf is not None:
            raise click.UsageError("--gguf is for --peer llama.cpp; give both")
        return None
    from kvq.controller.evaluation.llama import CACHE_BITS
    from kvq.controller.evaluation.peer import LlamaCaches

    if gguf is None:
        raise click.UsageError("--peer llama.cpp needs --gguf FILE, the file that the model was made from")
    wanted = kinds.split(",")
    if unknown := [kind for kind in wanted if kind not in CACHE_BITS]:
        raise click.UsageError(f"--cache-type takes {', '.join(CACHE_BITS)} with commas, got {', '.join(unknown)!r}")
    return LlamaCaches(gguf, wanted, model.architecture.vocab, model.engine.threads)


@evaluate.command()
@MODEL
@click.option("-p", "--policy", "policies", multiple=True, default=("int8", "int4", "int2"), show_default=True)
@BUDGETS
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to hide it in; else sentences made up.")
@click.option("--tokens", default="512,2048", show_default=True,
              help="Lengths, with question and answer; several with commas.")  # fmt: skip
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="What is hidden, see above; with commas.")
@click.option(
    "--items", type=click.IntRange(1, MOST_ITEMS), default=4, show_default=True, help="Documents of a kind and length."
)
@click.option("--depths", type=click.IntRange(1, MOST), default=5, show_default=True,
              help="Questions of a document, about as many places in it.")  # fmt: skip
@SEED
@RECENT
@SINK
@PROTECT
@JSON
def needle(
    model, policies, kv_bits, text, tokens, kinds, items, depths, seed, recent, sink, protect_bits, out, threads
) -> None:
    """Find again what a long text says: a number among filler, asked for at its end, beside the 16-bit cache.

    \b
    single     The access code of Anna Weber is 48213.
               Each question is about another thing.
    multi      The same of other people too, eight of whom nobody asks about.
    variables  The number of Anna is 48213. The number of Boris is the same as
               that of Anna.

    The answer has begun when the model is asked, so that a small one is measured on finding. "loglik" is the
    log-probability of the right number in nats, "hits" the share that greedy decoding gets right, "kept" the share of
    the 16-bit cache's hits that an arm has too; intervals are paired, over documents. With --json FILE a table goes to
    stdout, which kvq eval report writes too.

    A document is read once per arm, at the model's speed: 8,192 tokens take 10 to 20 s with SmolLM2-135M on two cores,
    and what is measured unless told otherwise some four minutes.
    """
    from kvq.controller.evaluation.filler import Filler
    from kvq.controller.evaluation.needle import measure
    from kvq.controller.evaluation.report import needle_table
    from kvq.controller.training.texts import read_text

    wanted = kinds.split(",")
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise click.UsageError(f"--kinds takes {', '.join(KINDS)} with commas, got {', '.join(unknown)!r}")
    lengths = numbers(tokens, "--tokens", int)
    filler = Filler() if text is None else Filler(read_text(text, "--text"), str(text))
    loaded = load_model(model, threads)
    arms = arms_of(
        loaded,
        ("fp16", *(name for name in policies if name != "fp16")),
        kv_bits,
        protected(recent, sink, protect_bits),
    )
    with bar() as progress:
        rows = measure(loaded, arms, lengths, wanted, items, depths, filler, seed, progress)
    write_rows(out, _of(loaded, rows), needle_table)


def _rows_of(file: Path) -> list[dict]:
    """What `kvq eval pareto`, `kld`, `needle`, `tasks` or `paper-table` have written."""
    try:
        rows = json.loads(read_bounded(file, MOST_TEXT))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise click.ClickException(f"{file} cannot be read as JSON ({why:.100})") from None
    needed = (
        {"arm", "context", "texts", "bits_requested", "kld_mean"},
        {"policy", "context", "positions", "tokens", "kld_mean"},
        {"arm", "kind", "tokens", "bits", "loglik", "hits"},
        {"arm", "task", "acc", "acc_norm", "bits"},
        {"arm", "cached", "ms"},
    )
    if isinstance(rows, list) and all(
        isinstance(row, dict) and any(each <= row.keys() for each in needed) for row in rows
    ):
        return rows
    raise click.ClickException(
        f"{file} has no rows of kvq eval pareto, kld, needle, tasks or paper-table; give what their --json has written"
    )


def parted(rows: list[dict], *names: str) -> tuple[list[dict], list[dict]]:
    """Those rows that have one of the names, and the others."""
    having = [row for row in rows if any(name in row for name in names)]
    return having, [row for row in rows if not any(name in row for name in names)]


@evaluate.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plot", "picture", **OUTPUT, help="Also draw damage against bytes as PNG.")
def report(files, picture) -> None:
    """Markdown tables from the JSON of `kvq eval pareto`, `kld`, `needle`, `tasks` or `paper-table`."""
    from kvq.controller.evaluation.report import kld_table, needle_table, plot, tables, task_table

    rows = [row for file in files for row in _rows_of(file)]
    found, rows = parted(rows, "loglik")
    asked, rows = parted(rows, "acc", "cached")
    placed, rows = parted(rows, "positions")
    parts = ((tables, rows), (kld_table, placed), (needle_table, found), (task_table, asked))
    if picture is not None and not rows:
        raise click.UsageError("--plot draws rows of kvq eval pareto, and there are none")
    try:
        say("\n\n".join(table(part).rstrip("\n") for table, part in parts if part))
        if picture is not None:
            plot(rows, picture)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        names = ", ".join(map(str, files))
        raise click.ClickException(f"{names}: a row is not as kvq eval writes it; measure it again") from None
