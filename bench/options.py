"""Options that several commands have, and how wrong ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from kvq.bench.shapes import default_cache
from kvq.runtime.machine.threads import MOST_THREADS, available_cores

HELP = {"help_option_names": ["-h", "--help"]}
FILE = click.Path(path_type=Path)


class Refused(click.ClickException):
    """A wrong option or file: one line on stderr says what is wrong and what would be right; exit code 2."""

    exit_code = 2

    def show(self, file=None) -> None:
        click.echo(f"kvq.bench: {self.message}", err=True)


def names(what: str, known: Callable[[str], Iterable[str]] | None = None):
    """Callback of an option that is a comma-separated list of names, each once.

    Args:
        what: is named, in singular.
        known: the right names, in view of the option's text; None leaves that to others.
    """

    def parse(context, parameter, text: str | None) -> list[str] | None:
        if text is None:
            return None
        found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        use = f"; use {', '.join(known(text))}" if known else ""
        for name in found:
            if known and name not in known(text):
                raise Refused(f"unknown {what} {name!r}{use}")
        if not found:
            raise Refused(f"no {what} given{use}")
        return found

    return parse


def counts(what: str, most: int = 1 << 20):
    """Callback of an option that is a comma-separated list of numbers of tokens, each once, ascending."""

    def parse(context, parameter, text: str) -> list[int]:
        parts = {part.strip() for part in text.split(",")}
        for part in parts:
            if not part.isdecimal() or not 1 <= int(part) <= most:
                raise Refused(f"{what} {part!r} is not a number of tokens from 1 to {most}")
        return sorted(set(map(int, parts)))

    return parse


def writable(context, parameter, file: Path | None) -> Path | None:
    """Callback of an option that is a file to write."""
    if file is not None and not file.absolute().parent.is_dir():
        raise Refused(f"{file} cannot be written: {file.absolute().parent} is not a folder")
    return file


def cores(context, parameter, threads: int | None) -> int:
    """Callback of a number of threads; all available cores if not given."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise Refused(f"threads must be from 1 to {MOST_THREADS}, got {threads}")
    return threads or available_cores()


json_option = click.option("--json", "json_file", type=FILE, callback=writable, help="Write the rows to this file.")
cache_option = click.option("--cache", type=FILE, default=default_cache, help="Of made models [~/.cache/kvq/bench]")
threads_option = click.option("--threads", type=int, callback=cores, help="Of every arm [all available cores]")
