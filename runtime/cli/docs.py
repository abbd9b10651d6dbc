"""``python -m kvq.runtime.cli.docs`` writes docs/cli.md from the help of every command."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator

import click

from kvq.runtime.cli.main import group
from kvq.runtime.cli.twins import TWINS

INTRODUCTION = """\
# Command line

`kvq COMMAND -h` prints what stands here; this file is written by `python -m kvq.runtime.cli.docs > docs/cli.md`.

Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 a known error, 2 wrong usage or a wrong value
of an option, both told in one line, 130 interrupted; a closed pipe ends a command quietly. `kvq-run` is `kvq run`.

{twins} One name
holds for all commands that have the flag:

{names}
"""


def entered(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    """A command's context as if it had been called, 80 columns wide."""
    return click.Context(command, parent, name, terminal_width=80, max_content_width=80, **command.context_settings)


def helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """(name, help text) of a command and its subcommands."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            if subcommand is not None:
                yield from helps(subcommand, entered(subcommand, name, context))


def twins(command: click.Command, context: click.Context) -> set[str]:
    """Environment twins of a command and its subcommands."""
    names = {str(parameter.envvar) for parameter in command.params if parameter.envvar is not None}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            if subcommand is not None:
                names |= twins(subcommand, context)
    return names


def document() -> str:
    """The text of docs/cli.md."""
    context = entered(group, "kvq")
    names = textwrap.fill(", ".join(f"`{name}`" for name in sorted(twins(group, context))), 120)
    parts = [INTRODUCTION.format(twins=TWINS, names=names)]
    for name, text in helps(group, context):
        parts.append(f"## {name}\n\n```\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(document())
