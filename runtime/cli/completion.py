"""``kvq completion``: what makes a shell complete commands, flags, policies and model names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from kvq.runtime.cli.options import SETTINGS, Command


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print completion code for SHELL, for kvq and kvq-run.

    \b
    Examples:
      eval "$(kvq completion bash)"                  # in ~/.bashrc
      eval "$(kvq completion zsh)"                   # in ~/.zshrc
      kvq completion fish > ~/.config/fish/completions/kvq.fish
    """
    from kvq.runtime.cli.main import group
    from kvq.runtime.cli.run import run

    found = get_completion_class(shell)
    if found is None:  # a click that does not know the shell
        raise click.UsageError(f"this version of click cannot complete in {shell}")
    for command, name in ((group, "kvq"), (run, "kvq-run")):
        variable = f"_{name}_COMPLETE".replace("-", "_").upper()
        click.echo(found(command, {}, name, variable).source())
