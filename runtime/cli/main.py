"""The ``kvq`` command group, and what all commands share: errors, interrupts, closed pipes."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable

import click

import kvq

# Command -> (module:attribute, help line). Loaded when used: `kvq --help` imports no model code.
COMMANDS = {
    "run": ("kvq.runtime.cli.run:run", "Generate text after a prompt (the same as kvq-run)."),
    "serve": ("kvq.runtime.cli.serve:serve", "Serve the OpenAI-compatible HTTP API."),
    "prefill": ("kvq.runtime.cli.prefill:prefill", "Read a text once, into a session file."),
    "info": ("kvq.runtime.cli.info:info", "Say what is in a session file or a bundle."),
    "export": ("kvq.exporter.cli:export", "Convert a Llama-architecture checkpoint to a bundle."),
    "eval": ("kvq.controller.evaluation.cli:evaluate", "Measure quality through the cache."),
    "train-controller": ("kvq.controller.cli:train_controller", "Train a bundle's precision controller on a text."),
    "train-model": ("kvq.models.train:main", "Train a small model from a text corpus."),
}
# What an extra brings, to name it when one of its packages is missing.
EXTRA_OF = {"matplotlib": "train", "lm_eval": "eval", "starlette": "server", "uvicorn": "server"}
EXTRA_PACKAGES = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "optimum",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "lm_eval",
    "starlette",
    "uvicorn",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from kvq.runtime.cli.options import with_twins

        module, attribute = COMMANDS[cmd_name][0].split(":")
        return with_twins(getattr(importlib.import_module(module), attribute))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvq.__version__, prog_name="kvq")
def group() -> None:
    """On-device LLM runtime with a per-token-precision KV cache."""


def main() -> None:
    """Entry point of ``kvq``."""
    guarded(lambda: group.main(standalone_mode=False))


def run_main() -> None:
    """Entry point of ``kvq-run``."""
    from kvq.runtime.cli.options import with_twins
    from kvq.runtime.cli.run import run

    guarded(lambda: with_twins(run).main(prog_name="kvq-run", standalone_mode=False))


def guarded(command: Callable[[], object]) -> None:
    """Run a command; a known error is one line on stderr.

    Exit codes: 0 done, 1 a known error, 2 wrong usage or the value of an option, 130 interrupted.
    A closed output pipe ends the process by SIGPIPE (141 in a shell).
    """
    from kvq.runtime.errors import BackendError, BudgetError, KvqError, PolicyError, SamplingError

    if hasattr(signal, "SIGPIPE"):
        # `kvq-run ... | head` ends quietly, as with any Unix filter; click would exit with 1.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal that lacks a character
    try:
        command()
    except click.UsageError as error:
        _naming_its_variable(error).show()
        _exit(2)
    except (BackendError, BudgetError, PolicyError, SamplingError) as error:  # the value of an option
        _exit(2, str(error))
    except (KvqError, click.ClickException) as error:
        _exit(1, str(error) if isinstance(error, KvqError) else error.format_message())
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA_PACKAGES:
            raise
        extra = EXTRA_OF.get(package, "export")
        _exit(1, f"this command needs {package}: pip install 'kvq[{extra}]', in a checkout '.[{extra}]'")
    except OSError as error:
        _exit(1, f"{error.filename or 'input or output'}: {error.strerror or error}; check path and free space")
    except (KeyboardInterrupt, click.Abort):
        _exit(130)


def _naming_its_variable(error: click.UsageError) -> click.UsageError:
    """The error, saying that a wrong value came from the environment, where it did."""
    parameter = error.param if isinstance(error, click.BadParameter) else None
    if not isinstance(parameter, click.Option) or parameter.name is None or error.ctx is None:
        return error
    if error.ctx.get_parameter_source(parameter.name) is not click.core.ParameterSource.ENVIRONMENT:
        return error
    return click.BadParameter(f"{error.message.rstrip('.')} (from {parameter.envvar}).", error.ctx, parameter)


def _exit(code: int, message: str = "") -> None:
    if message:
        click.echo("kvq: " + " ".join(message.split()), err=True)
    sys.exit(code)
