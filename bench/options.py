"""Options that several commands have, and how wrong ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from kvq.runtime.machine.threads import MOST_THREADS, available_cores

HELP = {"help_option_names": ["-h", "--help"]}


class Refused(click.ClickException):
    """A wrong option or file: one line on stderr says what is wrong and what would be right; exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"kvq.bench: {self.message}", err=True)


def names(what: str, known: Callable[[str], Iterable[str]] = lambda text: ()) -> Callable[..., list[str] | None]:
    """Callback of an option that is a comma-separated list, each name once.

    Args:
        what: is named, in singular.
        known: the right names, in view of the option's text; none if they are not known.
    """

    def parse(context: click.Context, parameter: click.Parameter, text: str | None) -> list[str] | None:
        if text is None:
            return None
        found, right = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())), list(known(text))
        for name in found if right else ():
            if name not in right:
                raise Refused(f"unknown {what} {name!r}; use {', '.join(right)}")
        if not found:
            raise Refused(f"no {what} given" + (f"; use {', '.join(right)}" if right else ""))
        return found

    return parse


def counts(what: str, most: int = 1 << 20) -> Callable[..., list[int]]:
    """Callback of an option that is a comma-separated list of numbers of tokens, each once, ascending."""

    def parse(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
        found = set()
        for part in map(str.strip, text.split(",")):
            if not part.isdecimal() or not 1 <= int(part) <= most:
                raise Refused(f"{what} {part!r} is not a number of tokens from 1 to {most}")
            found.add(int(part))
        return sorted(found)

    return parse


def writable(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Callback of an option that is a file to write."""
    if file is not None and not file.absolute().parent.is_dir():
        raise Refused(f"{file} cannot be written: {file.absolute().parent} is not a folder")
    return file


def cores(context: click.Context, parameter: click.Parameter, threads: int | None) -> int:
    """Callback of a number of threads; all available cores if not given."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise Refused(f"threads must be from 1 to {MOST_THREADS}, got {threads}")
    return threads or available_cores()


FILE = click.Path(path_type=Path)
json_option = click.option("--json", "json_file", type=FILE, callback=writable, help="Write the rows to this file.")
cache_option = click.option("--cache", type=FILE, help="Folder of the made models [~/.cache/kvq/bench]")
threads_option = click.option("--threads", type=int, callback=cores, help="Of every arm [all available cores]")
