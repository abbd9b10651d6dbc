"""``kvq eval tasks`` and ``kvq eval paper-table``: multiple choice through the cache."""

from __future__ import annotations

from pathlib import Path

import click

from kvq.controller.evaluation.cli.options import (
    BUDGETS,
    JSON,
    MODEL,
    PROTECT,
    RECENT,
    SEED,
    SINK,
    arms_of,
    bar,
    numbers,
    protected,
    write_rows,
)
from kvq.runtime.cli.loading import load_model
from kvq.runtime.cli.options import OFFLINE

DATA = click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of TASK.jsonl files; the hub's if not given."
)
LIMIT = click.option("--limit", type=click.IntRange(1), help="Items per task; all if not given.")


@click.command()
@MODEL
@click.option("-p", "--policy", "policies", multiple=True, default=("fp16", "int8", "int4", "int2"), show_default=True)
@click.option("--tasks", default="hellaswag,openbookqa,arc_easy,arc_challenge", show_default=True)
@BUDGETS
@click.option("--shots", type=click.IntRange(0), default=0, show_default=True,
              help="Examples in front of every item, drawn from the others.")  # fmt: skip
@SEED
@RECENT
@SINK
@PROTECT
@DATA
@LIMIT
@JSON
def tasks(model, policies, tasks, kv_bits, shots, seed, recent, sink, protect_bits, data, limit, out, threads) -> None:
    """Multiple-choice tasks through the cache, with lm-evaluation-harness: acc and acc_norm.

    An item alone is short: most of its tokens stand in the window and among the sinks, at 8 or 16 bits in every arm.
    --shots puts examples in front, which are read once per arm, and --recent 0 leaves no window; both together measure
    what the cache does. With --json FILE a table goes to stdout, which kvq eval report writes too.
    """
    from kvq.controller.evaluation.report import task_table
    from kvq.controller.evaluation.tasks import run_tasks

    loaded = load_model(model, threads)
    arms = arms_of(loaded, policies, kv_bits, protected(recent, sink, protect_bits))
    write_rows(out, run_tasks(loaded, arms, tasks.split(","), data, limit, shots, seed), task_table)


def _lengths(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Cached tokens of --latency; none for 0, None if it is not given."""
    if text is None:
        return None
    return [] if text == "0" else numbers(text, "--latency", int)


LATENCY = click.option(
    "--latency", callback=_lengths,
    help="Also time a decode step behind so many cached tokens, with commas; 0: do not. 512 and 2048 if not given, as"
    " far as the model has room.",
)  # fmt: skip


@click.command("paper-table")
@click.option("--models", required=True, help="Models as -m takes them, with commas between them.")
@OFFLINE
@click.option("--threads", type=int, metavar="N", help="CPU threads; all available cores if not given.")
@BUDGETS
@LATENCY
@RECENT
@SINK
@PROTECT
@DATA
@LIMIT
@JSON
def paper_table(models, kv_bits, latency, recent, sink, protect_bits, data, limit, out, threads) -> None:
    """The table of arXiv 2604.04722: accuracy (acc) and the time of a decode step.

    Of 16 bits, static 8 and 4 bits, rules and controllers. Steps are timed after the tasks, all policies in turn; leave
    the machine alone meanwhile. With --json FILE a table goes to stdout, which kvq eval report writes too.

    \b
    Where the hub can be reached:
      kvq export HuggingFaceTB/SmolLM-135M smollm-135m
      kvq train-controller smollm-135m --text books.txt --objective both
      kvq eval paper-table --models smollm-135m
    """
    from kvq.controller.evaluation.latency import check, measure, room
    from kvq.controller.evaluation.report import task_table
    from kvq.controller.evaluation.tasks import run_tasks

    rows: list[dict] = []
    for name in models.split(","):
        loaded = load_model(name, threads)
        lengths = [n for n in (512, 2048) if n <= room(loaded)] if latency is None else latency
        check(loaded, lengths)
        learned = [policy for policy in ("paper", "adaptive") if policy in loaded.bundle.manifest.controllers]
        policies = ("fp16", "int8", "int4", "rule", *learned)
        arms = arms_of(loaded, policies, kv_bits, protected(recent, sink, protect_bits))
        found = run_tasks(loaded, arms, ("hellaswag", "openbookqa", "arc_challenge"), data, limit)
        with bar() as progress:
            found += measure(loaded, arms, lengths, progress)
        rows += [{"model": loaded.bundle.manifest.name, **row} for row in found]
    write_rows(out, rows, task_table)
