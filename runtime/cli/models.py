"""``kvq list``, ``use``, ``name`` and ``rm``: the models on this machine, and what they are called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvq.runtime.cli.options import OFFLINE, SETTINGS, Command, complete_model, option
from kvq.runtime.errors import one_line

TITLES = ("model", "from", "size", "weights", "context", "controllers")


@click.command("list", cls=Command, context_settings=SETTINGS)
@option("--json", "as_json", is_flag=True, section="Basics", help="One JSON object per model, with paths.")
def list_models(as_json: bool) -> None:
    """List the models that -m takes: those on this machine, and those that kvq pull fetches.

    The default is marked *. What was fetched or exported is kept in KVQ_HOME, by default ~/.cache/kvq.

    \b
    Examples:
      kvq list
      kvq list --json
    """
    from kvq.runtime.catalog.choices import choices

    here, absent = _here(), _absent()
    if damage := choices().damage:
        _say(f"{damage}; names and default are lost, kvq use NAME writes it anew")
    if as_json:
        for row in here + absent:
            click.echo(json.dumps(row))  # ASCII: no control character of a path gets out
        return
    _table([("", *TITLES), *map(_cells, here)])
    if absent:
        click.echo("\nto be fetched with kvq pull:")
        _table([("", row["model"], _download(row), row["about"]) for row in absent])


def _here() -> list[dict[str, Any]]:
    """Rows of the models on this machine."""
    from kvq.runtime.catalog.checkpoints import local_exports
    from kvq.runtime.catalog.choices import choices
    from kvq.runtime.catalog.references import DEFAULT_MODEL, cached_models, described, embedded_models, pulled_models

    chosen = choices()
    named = {name: Path(place) for name, place in chosen.names.items()}
    default = chosen.default or DEFAULT_MODEL
    origins = {
        "embedded": embedded_models(), "pulled": pulled_models(), "hub": cached_models(), "local": local_exports(),
        "named": named,
    }  # fmt: skip
    return [
        {"model": name, "from": origin, "default": default in (name, str(path.absolute())), **described(path)}
        for origin, found in origins.items()
        for name, path in found.items()
    ]


def _absent() -> list[dict[str, Any]]:
    """Rows of the models of the registry that are not here."""
    from kvq.runtime.catalog.references import pulled_models
    from kvq.runtime.catalog.registry import registry

    here = pulled_models()
    return [
        {"model": name, "from": "registry", "default": False, "download_nbytes": entry.nbytes, "about": entry.about,
         "licence": entry.licence}
        for name, entry in registry().items() if name not in here
    ]  # fmt: skip


def _table(lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    widths[0] = 1
    for line in lines:
        click.echo(one_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from kvq.runtime.session.statistics import size

    first = ("*" if row["default"] else "", row["model"], row["from"])
    if "error" in row:
        return *first, "damaged:", row["error"], "", ""
    controllers = ", ".join(row["controllers"]) or "none"
    return *first, size(row["nbytes"]), str(row["weights"]), str(row["context"]), controllers


def _download(row: dict[str, Any]) -> str:
    from kvq.runtime.session.statistics import size

    return size(row["download_nbytes"]) if row["download_nbytes"] else "size unknown"


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model", required=False, shell_complete=complete_model)
def use(model: str | None) -> None:
    """Make MODEL the default of all commands; without MODEL, say which one it is.

    -m and KVQ_MODEL go before the default.

    \b
    Examples:
      kvq use smollm2-135m-instruct
      kvq use ./my-bundle
    """
    from kvq.runtime.catalog.choices import changed
    from kvq.runtime.catalog.references import default_model, find

    if model is None:
        _tell(default_model()[0])
        return
    found = find(model)
    if found.path is None:
        raise click.ClickException(f"{found.name} is not here yet; {found.way}")
    _check(found.path, model)
    reference = str(found.path.absolute()) if found.origin in ("folder", "checkpoint") else found.name
    with changed(_say) as chosen:
        chosen.default = reference
    _tell(f"{reference} is the default now")


@click.command("name", cls=Command, context_settings=SETTINGS)
@click.argument("model", shell_complete=complete_model)
@click.argument("name")
@OFFLINE
def name_model(model: str, name: str) -> None:
    """Give MODEL, anything that -m takes, a NAME of your own. A checkpoint is exported first; kvq rm forgets a name.

    \b
    Examples:
      kvq name ./my-bundle mine
      kvq name ./SmolLM-135M.Q8_0.gguf small
    """
    from kvq.runtime.catalog.choices import USER_NAME, changed
    from kvq.runtime.catalog.references import embedded_models, locate
    from kvq.runtime.catalog.registry import registry

    if not USER_NAME.fullmatch(name):
        raise click.ClickException(f"{name!r} is no name: letters, digits, dot, dash and underscore")
    if name in embedded_models() or name.lower() in registry():
        raise click.ClickException(f"{name} is the name of another model; choose one that kvq list does not show")
    path = locate(model, notice=_say).absolute()
    _check(path, model)
    with changed(_say) as chosen:
        chosen.names[name] = str(path)
    _tell(f"{name} is {path}")


@click.command("rm", cls=Command, context_settings=SETTINGS)
@click.argument("model", shell_complete=complete_model)
@option("-y", "--yes", is_flag=True, section="Basics", help="Do not ask.")
def remove(model: str, yes: bool) -> None:
    """Remove MODEL from this machine: what kvq has fetched or exported, or a name. Nothing else is touched.

    \b
    Examples:
      kvq rm smollm2-135m-instruct
      kvq rm mine --yes
    """
    from kvq.runtime.catalog.removal import removal

    found = removal(model)
    what = str(found.folder) if found.folder else f"the name {model}"
    if not yes:
        if not sys.stdin.isatty():
            raise click.ClickException(f"{what} is removed only with --yes where nobody can be asked")
        click.confirm(f"Remove {one_line(what)}?", abort=True, err=True)
    found.run()
    told = f"{model} is removed"
    if found.kept:
        told = f"{model} is forgotten; {found.kept} stays"
    also = [name for name in found.names if name != model]
    told += f"; the name {', '.join(also)} with it" if also else ""
    _tell(told + ("; it was the default, which is the embedded model again" if found.default else ""))


def _check(path: Path, reference: str) -> None:
    from kvq.runtime.catalog.references import described
    from kvq.runtime.errors import BundleError

    if "error" in (row := described(path)):
        raise BundleError(f"{reference} is no bundle that can be used: {row['error']}")


def _tell(text: str) -> None:
    """A line on stdout: names of folders must not move the cursor of a terminal."""
    click.echo(one_line(text))


def _say(text: str) -> None:
    click.echo(f"kvq: {one_line(text)}", err=True)
