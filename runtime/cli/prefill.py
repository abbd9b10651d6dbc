"""``kvq prefill``: read a text once, into a session file that can be asked many questions."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from kvq.runtime.cli.options import CACHE, MODEL, SETTINGS, Command, load_model, option, options
from kvq.runtime.cli.run import read_prompt
from kvq.runtime.errors import SessionError


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="SESSION",
    section="Basics",
    help="The session file to make.",
)
@option("--overwrite", is_flag=True, section="Basics", help="Replace an existing session file.")
@option("-q", "--quiet", is_flag=True, section="Basics", help="No progress, no statistics line.")
@options(MODEL)
@options(CACHE)
def prefill(
    file, out, overwrite, quiet, model, policy, kv_bits, kv_memory, recent, sink, prefill, backend, threads
) -> None:  # fmt: skip
    """Read the text FILE (- is stdin) and keep what the model has made of it in a session file.

    \b
    Examples:
      kvq prefill report.txt -o report.kvq -p int4
      kvq-run --session report.kvq --session-readonly "In short, the report says"
    """
    if os.path.lexists(out) and not overwrite:
        raise SessionError(f"{out} exists already; choose another name or pass --overwrite")
    text = read_prompt(None, file)
    loaded = load_model(model, threads)
    session = loaded.session(
        policy, recent=recent, sink=sink, prefill=prefill, backend=backend, kv_bits=kv_bits, kv_memory=kv_memory
    )
    ids = loaded.encode(text)
    begun = time.perf_counter()
    if quiet:
        session.append(ids)
    else:
        with click.progressbar(length=len(ids), label="reading", file=sys.stderr) as bar:
            session.append(ids, progress=lambda done, total: bar.update(done - bar.pos))
    seconds = time.perf_counter() - begun
    session.save(out)
    if not quiet:
        stats = session.stats().line()
        click.echo(f"{out}: {out.stat().st_size / 1e3:.1f} kB, read in {seconds:.2f} s | {stats}", err=True)
