"""Two checkouts of kvq side by side, to show what a change costs.

    python -m kvq.bench.compare A B --model BUNDLE --rounds 10 --json compare.json

A and B are folders, each with its own native library built in it. Each has a process with the model loaded, and new
processes for what a start costs; they take turns, A B B A and so on, so that both see the same state of the machine. A
first turn is not counted. Ratios are B / A turn by turn: their median, in brackets their quartiles; below 1 is better
for B but for tokens/s, where above 1 is.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvq.bench.kvq import checkout
from kvq.bench.machine import machine
from kvq.bench.options import FILE, HELP, Refused, counts, json_option, names, threads_option
from kvq.bench.process import Child
from kvq.bench.report.tables import Columns, Results, Row, number, quarters, quartiles
from kvq.bench.schedule import in_turn

EMBEDDED = "kvq-books"
OPTIONS: dict[str, dict[str, Any]] = {"adaptive": {"kv_bits": 3.25}}
COLUMNS: Columns = {
    "measure": lambda row: row["measure"],
    "policy": lambda row: row["policy"] or "",
    "tokens": lambda row: str(row["tokens"] or ""),
    "A": number("a_median", ".2f"),
    "B": number("b_median", ".2f"),
    "B / A": lambda row: quartiles(row["ratios"], ".3f"),
}
Values = dict[tuple[str, str | None, int | None], dict[str, list[float]]]  # measure, policy, tokens -> side -> turns


def process(folder: Path, name: str, **job: Any) -> Child:
    """An object of `kvq.bench.kvq.checkout` in a process whose kvq is that of the folder."""
    return Child(f"{checkout.__file__}:{name}", job, job.get("threads"), folder)


def start(folder: Path) -> dict[str, float]:
    """What a new process costs, by measure."""
    begun = time.perf_counter()
    with process(folder, "Fresh") as child:
        answer = child.ask("first_token", model=EMBEDDED)
        return {"first token, ms": 1e3 * (time.perf_counter() - begun), **answer}


def check(folders: dict[str, Path], about: dict[str, Row]) -> None:
    """Raise Refused where a folder is no checkout, or attention is not computed alike."""
    for side, folder in folders.items():
        if Path(about[side]["file"]).resolve() != folder / "kvq" / "__init__.py":
            raise Refused(f"{side}: {folder} is not a checkout of kvq; give the folder with pyproject.toml")
    backends = {side: row["backend"] for side, row in about.items()}
    if len(set(backends.values())) > 1:
        raise Refused(f"attention differs, {backends}; build the native library in both")


def summary(values: Values) -> list[Row]:
    """Of each measure the values of the counted turns, their medians, and the ratios."""
    rows = []
    for (measure, policy, tokens), sides in values.items():
        a, b = (np.array(turns[1:]) for _, turns in sorted(sides.items()))
        p25, median, p75 = quarters(b / a)
        row = {"measure": measure, "policy": policy, "tokens": tokens, "a": a.tolist(), "b": b.tolist()}
        row |= {"a_median": float(np.median(a)), "b_median": float(np.median(b)), "ratios": (b / a).tolist()}
        rows.append(row | {"ratio_p25": p25, "ratio_median": median, "ratio_p75": p75})
    return rows


@click.command(context_settings=HELP)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--model", default=EMBEDDED, show_default=True, help="Bundle; starts are measured on the embedded model.")
@click.option("--policies", default="int4,mixed,adaptive,fp16", show_default=True, callback=names("policy"))
@click.option("--context", default="512,2048", show_default=True, callback=counts("context"), help="Cached tokens.")
@click.option("--rounds", default=10, show_default=True, help="Counted turns of each checkout.")
@click.option("--steps", default=33, show_default=True, help="Decode steps of a turn; the first is not counted.")
@threads_option
@json_option
def main(a, b, model, policies, context, rounds, steps, threads, json_file) -> None:
    """Compare checkouts A and B: decode, prefill, import, first token. `adaptive` has 3.25 bits a value."""
    if rounds < 1 or steps < 2:
        raise Refused(f"rounds must be at least 1 and steps at least 2, got {rounds} and {steps}")
    folders = {"A": a.resolve(), "B": b.resolve()}
    model = str(Path(model).resolve()) if Path(model).exists() else model
    values: Values = defaultdict(lambda: {side: [] for side in folders})
    wanted = {policy: OPTIONS.get(policy, {}) for policy in policies}

    def keep(side, answer, policy=None, tokens=None) -> None:
        for measure, value in answer.items():
            values[measure, policy, tokens][side].append(value)

    with ExitStack() as stack:
        children = {
            side: stack.enter_context(process(folder, "Loaded", model=model, threads=threads))
            for side, folder in folders.items()
        }
        about = {side: child.ask("about", policies=wanted) for side, child in children.items()}
        check(folders, about)
        for policy, reason in (about["A"]["refused"] | about["B"]["refused"]).items():
            click.echo(f"{policy}: skipped, {reason}", err=True)
            del wanted[policy]
        lengths = {min(length, *(row["context"] - steps for row in about.values())) for length in context}
        for turn in range(rounds + 1):
            click.echo(f"round {turn} of {rounds}", err=True)
            for side in in_turn(folders, turn):
                keep(side, start(folders[side]))
            for tokens in sorted(lengths):
                ids = np.random.default_rng(turn).integers(1, 256, tokens).tolist()
                for policy, options in wanted.items():
                    for side in in_turn(folders, turn):
                        task = {"policy": policy, "options": options, "ids": ids, "steps": steps}
                        keep(side, children[side].ask("measure", **task), policy, tokens)
    results, run = Results(COLUMNS, json_file), machine() | {"model": model, "threads": threads, "steps": steps}
    for row in summary(values):
        results.add(row | {"run": run | {side: str(folder) for side, folder in folders.items()} | {"about": about}})


if __name__ == "__main__":
    main()
