"""``kvq list``: the models on this machine that have a name."""

from __future__ import annotations

import json
from typing import Any

import click

from kvq.runtime.cli.options import SETTINGS, Command, option


@click.command("list", cls=Command, context_settings=SETTINGS)
@option("--json", "as_json", is_flag=True, section="Basics", help="One JSON object per model, with paths.")
def list_models(as_json: bool) -> None:
    """List the models that -m takes by name: embedded ones, and those fetched from the hub.

    Fetched models are kept in KVQ_HOME, by default ~/.cache/kvq.

    \b
    Examples:
      kvq list
      kvq list --json
    """
    from kvq.runtime.references import cached_models, described, embedded_models

    rows = [
        {"model": name, "from": origin, **described(path)}
        for origin, found in (("embedded", embedded_models()), ("hub", cached_models()))
        for name, path in found.items()
    ]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row, ensure_ascii=False))
        return
    titles = ("model", "from", "size", "weights", "context", "controllers")
    table = [titles, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(titles))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from kvq.runtime.statistics import size

    if "error" in row:
        return row["model"], row["from"], "damaged:", row["error"], "", ""
    controllers = ", ".join(row["controllers"]) or "none"
    return row["model"], row["from"], size(row["nbytes"]), str(row["weights"]), str(row["context"]), controllers
