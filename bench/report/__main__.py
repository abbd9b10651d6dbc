"""Rows of the decode benchmark as a page of the documentation.

python -m kvq.bench.report decode.json [more.json ...] -o docs/performance.md
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvq.bench.options import FILE, HELP, Refused
from kvq.bench.report.page import page
from kvq.bench.report.tables import Row
from kvq.runtime.files import write_atomically

NEEDED = ("arm", "shape", "context", "threads", "ms_per_token", "prefill_tokens_per_s", "kv_bytes", "peak_rss_bytes")


def read_rows(file: Path) -> list[Row]:
    """Rows of one JSON file of the decode benchmark.

    Raises:
        Refused: it is not one.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "run" in r for r in rows):
        raise Refused(f"{file} holds no rows; give a file written by python -m kvq.bench.decode --json")
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise Refused(f"a row of {file} has no {missing[0]}; measure again with this version")
    return rows


@click.command(context_settings=HELP)
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("-o", "--out", default="docs/performance.md", show_default=True, type=FILE, help="The page.")
def main(files, out) -> None:
    """Write a page about the JSON FILES of the decode benchmark; plots go beside it."""
    read = [(file.stem, read_rows(file)) for file in files]
    try:
        write_atomically(out, page(read, out.absolute().parent))
    except OSError as error:
        raise click.ClickException(f"{error.filename} cannot be written ({error.strerror})") from None
    click.echo(f"{out}: {sum(len(rows) for _, rows in read)} rows", err=True)


if __name__ == "__main__":
    main()
