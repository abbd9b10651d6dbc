"""Speed of a decode step against the length of the cached text, kvq next to other runtimes.

    python -m kvq.bench.decode --shape smollm-135m --context 512,2048 --json decode.json
    python -m kvq.bench.decode --shape SmolLM2-135M-Instruct.Q4_1.gguf

All arms run the same random weights of a SmolLM's shape, or a GGUF file: llama.cpp as it is, kvq what it exports of it
by default, the other peers not. They take turns in short bursts of decode steps, and are checked
against kvq's numpy backend before a speed is printed. Models are made on first use and kept in the cache folder; that
and the peers need `pip install 'kvq-run[bench]'`. A peer that is not installed is named as skipped. The table goes to
stdout, progress to stderr.

Exit codes: 0 done, 1 an arm failed its check or nothing could be measured, 2 a wrong option.
"""

from __future__ import annotations

import sys

import click

from kvq.bench.arm import arms as known_arms
from kvq.bench.machine import machine
from kvq.bench.options import FILE, HELP, Refused, cache_option, counts, json_option, names, threads_option, writable
from kvq.bench.report.page import decode_table
from kvq.bench.report.plot import write_plot
from kvq.bench.report.tables import write_json
from kvq.bench.schedule import Run
from kvq.bench.shapes import BENCH_SHAPES, FEW, GGUF, LONGEST, ROOM
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import KvqError

ALL = ",".join(known_arms())
OTHERS = ("tiny", f"tiny{FEW}")
SHAPE = names("shape", lambda text: (*BENCH_SHAPES, *([text] if text in OTHERS or text.endswith(GGUF) else [])))
ARMS = names("arm", lambda text: known_arms())
BACKEND = names("backend", lambda text: ("auto", *BACKENDS))
SHAPES = ", ".join(BENCH_SHAPES)
CONTEXTS = counts("context", LONGEST)


@click.command(context_settings=HELP)
@click.option(
    "--shape", default="smollm-135m", show_default=True, callback=SHAPE, help=f"One of {SHAPES}, or a GGUF file."
)
@click.option("--context", default="512,2048,8192", show_default=True, callback=CONTEXTS, help="Cached tokens.")
@click.option("--arms", default=ALL, show_default=True, callback=ARMS, help="What to compare, comma-separated.")
@threads_option
@click.option("--backend", callback=BACKEND, help="Attention backend of the kvq arms; the fastest one if not given.")
@click.option("--steps", default=8, show_default=True, help="Decode steps per burst; the first is not counted.")
@click.option("--rounds", default=8, show_default=True, help="Counted bursts of each arm.")
@click.option("--prefills", default=20, show_default=True, help="Most counted fillings of each cache; fewer if long.")
@cache_option
@json_option
@click.option("--plot", type=FILE, callback=writable, help="Write ms per token against context as an image.")
def main(shape, context, arms, threads, backend, steps, rounds, prefills, cache, json_file, plot) -> None:
    """Measure decode speed, arms interleaved in one run."""
    if steps < 1 or rounds < 1 or steps * (rounds + 1) > ROOM:
        raise Refused(f"steps * (rounds + 1) must be from 2 to {ROOM} tokens, got {steps} and {rounds}")
    if prefills < 1:
        raise Refused(f"prefills must be at least 1, got {prefills}")
    kernels = backend[0] if backend else None
    grid = (shape[0], arms, context, threads, cache, kernels)
    try:
        run = Run(*grid, steps, rounds, prefills, lambda line: click.echo(line, err=True))
    except KvqError as error:
        raise Refused(str(error)) from None
    most = run.assets.fields["max_position_embeddings"] - ROOM
    if max(context) > most:
        raise Refused(f"{shape[0]} has room for {most} cached tokens and {ROOM} steps; leave out {max(context)}")
    try:
        measure(run, json_file)
    except KeyboardInterrupt:
        sys.exit(130)
    for arm, reason in run.skipped.items():
        click.echo(f"{arm}: skipped, {reason}")
    if plot is not None and run.rows:
        write_plot(run.rows, plot)
    sys.exit(1 if run.wrong or not run.rows else 0)


def measure(run: Run, json_file) -> None:
    """Measure and print context by context; a long run that is broken off leaves the rows it has in the file."""
    run.prepare()
    about = machine(*{name: None for arm in known_arms().values() for name in arm.distributions})
    for context in run.contexts:
        before = len(run.rows)
        run.measure(context)
        for row in run.rows:  # one file is a list of rows, so each says what it was measured on
            row["run"] = about | {"skipped": run.skipped}
        if new := run.rows[before:]:
            click.echo("\n" + decode_table(new) + "\n")
        write_json(run.rows, json_file)


if __name__ == "__main__":
    main()
