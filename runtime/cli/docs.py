"""``python -m kvq.runtime.cli.docs`` writes docs/cli.md from the help of every command."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from kvq.runtime.cli.main import group
from kvq.runtime.cli.options import TWINS, twin

INTRODUCTION = """\
# Command line

`kvq COMMAND -h` prints what stands here; this page is written by `python -m kvq.runtime.cli.docs > docs/cli.md`.

Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 a known error, told in one line, 2 wrong usage or
a wrong value of an option, 130 interrupted; a closed pipe ends a command quietly. `kvq-run` is `kvq run`.

{twins} One name holds for all commands that have the flag:

{names}
"""


def pages(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """(name, help) of a command and its subcommands, 80 columns wide."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            if subcommand is not None:
                yield from pages(subcommand, click.Context(subcommand, info_name=name, parent=context))


def twins(command: click.Command, context: click.Context) -> set[str]:
    """Environment twins of a command and its subcommands."""
    names = {twin(option) for option in command.params if isinstance(option, click.Option)}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            if subcommand is not None:
                names |= twins(subcommand, context)
    return {name for name in names if name and name not in ("KVQ_HELP", "KVQ_VERSION")}


def document() -> str:
    """The text of docs/cli.md."""
    context = click.Context(group, info_name="kvq", terminal_width=80, max_content_width=80)
    names = ", ".join(f"`{name}`" for name in sorted(twins(group, context)))
    parts = [INTRODUCTION.format(twins=TWINS, names=names)]
    for name, text in pages(group, context):
        parts.append(f"## {name}\n\n```\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(document())
