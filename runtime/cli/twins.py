"""Environment twins: every flag has a variable, and an error says when a value came from there.

A flag's variable is named after its longest form whatever the command: --kv-bits is KVQ_KV_BITS. A flag beats the
variable. `with_twins` gives them to a command; the command group calls it, so a new command has them without doing
anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import click
from click.core import ParameterSource

from kvq.runtime.errors import BackendError, BudgetError, GrammarError, KvqError, PolicyError, SamplingError

TWINS = "Every flag has an environment twin: --kv-bits is KVQ_KV_BITS. A flag beats the variable."
# Errors of a value that an option had, and the options it may have been.
BLAMED: dict[type[KvqError], tuple[str, ...]] = {
    BackendError: ("backend", "threads"),
    BudgetError: ("policy", "kv_bits", "kv_memory", "recent", "sink", "protect_bits"),
    PolicyError: ("policy", "prefill", "recent", "sink", "protect_bits"),
    SamplingError: (
        "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "seed", "stop", "stop_tokens", "draft",
    ),
    GrammarError: ("schema", "regex", "grammar", "choice"),
}  # fmt: skip


def with_twins(command: click.Command) -> click.Command:
    """Give every option of a command, and of its subcommands, its environment twin; the help says so."""
    for parameter in command.params:
        if (
            isinstance(parameter, click.Option)
            and parameter.envvar is None
            and parameter.name not in ("help", "version")
        ):
            parameter.envvar = twin(parameter)
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            with_twins(subcommand)
        return command
    if command.epilog is None:
        command.epilog = TWINS
    if command.callback is not None and not isinstance(command.callback, _Blaming):
        command.callback = _Blaming(command.callback)
    return command


def twin(parameter: click.Option) -> str | None:
    """Name of an option's environment variable; None for one without a long form."""
    long = [name for name in parameter.opts if name.startswith("--")]
    return "KVQ_" + long[0][2:].upper().replace("-", "_") if long else None


def variable(context: click.Context | None, parameter: click.Parameter | None) -> str | None:
    """Name of the variable that a parameter's value came from; None where it came otherwise."""
    if context is None or not isinstance(parameter, click.Option) or parameter.name is None:
        return None
    if context.get_parameter_source(parameter.name) is not ParameterSource.ENVIRONMENT:
        return None
    return str(parameter.envvar)


class _Blaming:
    """What a command runs, its errors about the value of an option with the variables that may have set it."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self._callback = callback
        update_wrapper(self, callback)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            return self._callback(*arguments, **named)
        except tuple(BLAMED) as error:
            if set_by := blamed(click.get_current_context(), error):
                error.args = (f"{error} (from the environment: {set_by})",)
            raise


def blamed(context: click.Context, error: KvqError) -> str:
    """The variables behind an error of a value, as they are set: "KVQ_KV_BITS=4"; "" for none."""
    names = next(names for kind, names in BLAMED.items() if isinstance(error, kind))
    found = [variable(context, parameter) for parameter in context.command.params if parameter.name in names]
    return ", ".join(f"{name}={os.environ.get(name, '')}" for name in found if name is not None)
