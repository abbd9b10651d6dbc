"""Speed of a decode step against the length of the cached text, kvq next to other runtimes.

    python -m kvq.bench.decode --shape smollm-135m --context 512,2048 --json decode.json

All arms run the same random weights of a SmolLM's shape, take turns in short bursts of decode steps,
and are checked against kvq's numpy backend before a speed is printed. Models are made on first use
and kept in the cache folder; that and the peers need `pip install 'kvq-run[bench]'`. A peer that is not
installed is named as skipped. The table goes to stdout, progress to stderr.

Exit codes: 0 done, 1 an arm failed its check or nothing could be measured, 2 a wrong option.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from kvq.bench.arms import ARMS
from kvq.bench.shapes import BENCH_SHAPES, LONGEST, ROOM, default_cache
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.machine.threads import MOST_THREADS, available_cores


class OptionError(Exception):
    """The value of an option; one line says what is wrong and what would be right."""


def parse_names(text: str, known: list[str], what: str) -> list[str]:
    """Names of a comma-separated list, each once.

    Raises:
        OptionError: none, or one that is not known.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise OptionError(f"unknown {what} {name!r}; use {', '.join(known)}")
    if not names:
        raise OptionError(f"no {what} given; use {', '.join(known)}")
    return names


def parse_contexts(text: str) -> list[int]:
    """Token counts of a comma-separated list, each once, ascending.

    Raises:
        OptionError: not a number, or out of range.
    """
    found = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= LONGEST:
            raise OptionError(f"context {part.strip()!r} is not a number of tokens from 1 to {LONGEST}")
        found.add(int(part))
    return sorted(found)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shape", default="smollm-135m", show_default=True, help=f"One of {', '.join(BENCH_SHAPES)}.")
@click.option("--context", default="512,2048,8192", show_default=True, help="Cached tokens, comma-separated.")
@click.option("--arms", default=",".join(ARMS), show_default=True, help="What to compare, comma-separated.")
@click.option("--threads", type=int, help="Threads of every arm; all available cores if not given.")
@click.option("--backend", help="Attention backend of the kvq arms; the fastest one if not given.")
@click.option("--steps", default=8, show_default=True, help="Decode steps per burst; the first is not counted.")
@click.option("--rounds", default=8, show_default=True, help="Counted bursts of each arm.")
@click.option("--prefills", default=20, show_default=True, help="Most counted fillings of each cache; fewer if long.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the made models [~/.cache/kvq/bench]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write ms per token against context as an image.")
def main(shape, context, arms, threads, backend, steps, rounds, prefills, cache, json_file, plot) -> None:
    """Measure decode speed, arms interleaved in one run."""
    try:
        plan = {
            "shape": parse_names(shape, [*BENCH_SHAPES, *(["tiny"] if shape == "tiny" else [])], "shape")[0],
            "arms": parse_names(arms, list(ARMS), "arm"),
            "contexts": parse_contexts(context),
            "threads": threads if threads is not None else available_cores(),
            "cache": cache or default_cache(),
            "backend": parse_names(backend, ["auto", *BACKENDS], "backend")[0] if backend else None,
            "steps": steps,
            "rounds": rounds,
            "prefills": prefills,
        }
        if not 1 <= plan["threads"] <= MOST_THREADS:
            raise OptionError(f"threads must be from 1 to {MOST_THREADS}, got {threads}")
        if steps < 1 or rounds < 1 or steps * (rounds + 1) > ROOM:
            raise OptionError(f"steps * (rounds + 1) must be from 2 to {ROOM} tokens, got {steps} and {rounds}")
        if prefills < 1:
            raise OptionError(f"prefills must be at least 1, got {prefills}")
        for file in (json_file, plot):
            if file is not None and not file.absolute().parent.is_dir():
                raise OptionError(f"{file} cannot be written: {file.absolute().parent} is not a folder")
    except OptionError as error:
        click.echo(f"kvq.bench.decode: {error}", err=True)
        sys.exit(2)
    try:
        wrong = run(plan, json_file, plot)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if wrong else 0)


def run(options: dict[str, Any], json_file: Path | None, plot: Path | None) -> bool:
    """Measure, print and write; whether an arm failed its check or nothing was measured."""
    from kvq.bench.machine import machine
    from kvq.bench.schedule import Plan, Run
    from kvq.bench.table import decode_table, write_plot

    plan = Plan(**options)
    bench = Run(plan, lambda line: click.echo(line, err=True))
    bench.prepare()
    about = machine()
    for context in plan.contexts:
        before = len(bench.result.rows)
        bench.measure(context)
        for row in bench.result.rows:  # one file is a list of rows, so each says what it was measured on
            row["run"] = about | {"skipped": bench.result.skipped}
        if new := bench.result.rows[before:]:
            click.echo("\n" + decode_table(new) + "\n")
        if json_file is not None:  # after every context: a long run that is broken off leaves what it has
            write_json(bench.result.rows, json_file)
    for arm, reason in bench.result.skipped.items():
        click.echo(f"{arm}: skipped, {reason}")
    if plot is not None and bench.result.rows:
        write_plot(bench.result.rows, plot)
    return bool(bench.result.wrong) or not bench.result.rows


def write_json(rows: list[dict[str, Any]], file: Path) -> None:
    """Write to a temporary file and rename it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.rename(file)


if __name__ == "__main__":
    main()
