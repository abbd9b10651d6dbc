"""The ``kvq`` command group, and what all commands share: errors, interrupts, closed pipes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

import kvq

# Command -> (module:attribute, help line). Loaded when used: `kvq --help` imports no model code.
COMMANDS = {
    "run": ("kvq.runtime.cli.run:run", "Answer a question, or go on with a text (the same as kvq-run)."),
    "chat": ("kvq.runtime.cli.chat:chat", "Talk with a model."),
    "prefill": ("kvq.runtime.cli.prefill:prefill", "Read a text once, into a session file."),
    "info": ("kvq.runtime.cli.info:info", "Say what is in a session file or a bundle."),
    "list": ("kvq.runtime.cli.models:list_models", "List the models here, and those to be fetched."),
    "pull": ("kvq.runtime.cli.pull:pull", "Fetch a model by name, once."),
    "use": ("kvq.runtime.cli.models:use", "Choose the default model."),
    "show": ("kvq.runtime.cli.show:show", "Show all about a model."),
    "name": ("kvq.runtime.cli.models:name_model", "Give a model a name of your own."),
    "rm": ("kvq.runtime.cli.models:remove", "Remove a model from this machine."),
    "serve": ("kvq.runtime.cli.serve:serve", "Serve the OpenAI-compatible HTTP API."),
    "batch": ("kvq.runtime.cli.batch:batch", "Answer a file of requests, each line once."),
    "inspect": ("kvq.runtime.cli.inspect:inspect", "Show a text with each token shaded by its precision."),
    "export": ("kvq.exporter.cli:export", "Convert a checkpoint folder or a GGUF file to a bundle."),
    "eval": ("kvq.controller.evaluation.cli:evaluate", "Measure quality through the cache."),
    "train-controller": ("kvq.controller.cli:train_controller", "Train a bundle's precision controller on a text."),
    "train-model": ("kvq.models.train:main", "Train a small model from a text corpus."),
    "completion": ("kvq.runtime.cli.completion:completion", "Print shell completion code."),
}
# The extra that brings a package, to name it when the package is missing.
EXTRA_OF = {
    **dict.fromkeys(["onnx", "onnx_ir", "gguf", "safetensors"], "export"),
    **dict.fromkeys(["torch", "transformers"], "train"),
    "optimum": "single",
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "lm_eval": "eval",
    **dict.fromkeys(["starlette", "uvicorn"], "server"),
}


# What click raises where a command that needs arguments has none; older versions have no name for it.
NO_ARGUMENTS: type[click.UsageError] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:  # click's own looks at commands that are imported
            import difflib

            if near := difflib.get_close_matches(args[0], COMMANDS, 1):
                ctx.fail(f"No such command {args[0]!r:.60}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from kvq.runtime.cli.twins import with_twins

        module, attribute = COMMANDS[cmd_name][0].split(":")
        return with_twins(getattr(importlib.import_module(module), attribute))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's own would import every command to learn whether it is hidden.
        named = [CompletionItem(name, help=COMMANDS[name][1]) for name in COMMANDS if name.startswith(incomplete)]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvq.__version__, prog_name="kvq")
def group() -> None:
    """On-device LLM runtime with a per-token-precision KV cache."""


def main() -> None:
    """Entry point of ``kvq``."""
    guarded(lambda: group.main(prog_name="kvq", standalone_mode=False))


def run_main() -> None:
    """Entry point of ``kvq-run``."""
    from kvq.runtime.cli.run import run
    from kvq.runtime.cli.twins import with_twins

    guarded(lambda: with_twins(run).main(prog_name="kvq-run", standalone_mode=False))


def guarded(command: Callable[[], object]) -> None:
    """Run a command; a known error is one line on stderr.

    Exit codes: 0 done, 1 a known error, 2 wrong usage or the value of an option, 130 interrupted.
    A closed output pipe ends the process by SIGPIPE (141 in a shell).
    """
    from kvq.runtime.errors import BackendError, BudgetError, GrammarError, KvqError, PolicyError, SamplingError
    from kvq.runtime.machine.pipes import end_with_a_closed_pipe

    end_with_a_closed_pipe()  # click would exit with 1
    _standard_streams()
    try:
        command()
    except click.UsageError as error:
        if isinstance(error, NO_ARGUMENTS):  # its message is the help
            error.show()
            _exit(2)
        _exit(2, *_usage(error))
    except (BackendError, BudgetError, GrammarError, PolicyError, SamplingError) as error:  # the value of an option
        _exit(2, str(error))
    except (KvqError, click.ClickException) as error:
        _exit(1, str(error) if isinstance(error, KvqError) else error.format_message())
    except ImportError as error:
        if _interrupted(error):
            _exit(130)
        package = (error.name or "").split(".")[0]
        if not isinstance(error, ModuleNotFoundError) or package not in EXTRA_OF:
            raise
        from kvq.runtime.extras import install

        _exit(1, f"this command needs {package}: {install(EXTRA_OF[package])}")
    except MemoryError:
        _exit(1, "not enough memory; free some, take a smaller model, or store fewer bits a value with --kv-bits")
    except OSError as error:
        _exit(1, f"{error.filename or 'input or output'}: {error.strerror or error}; check path and free space")
    except (KeyboardInterrupt, click.Abort):
        _exit(130)


def _interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt is at the bottom of it: a module in C that is being imported makes another error of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _standard_streams() -> None:
    """Make sure of stdin, stdout and stderr: Python has None for those that were closed when it started."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 # for as long as the process lives
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        _exit(1, "stdout is closed; redirect it to /dev/null where the text is not wanted")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal that lacks a character


def _usage(error: click.UsageError) -> tuple[str, str]:
    """What to tell of wrong usage, and who tells it: where a wrong value came from, and where to look up the right."""
    from kvq.runtime.cli.twins import variable

    hints = []
    if isinstance(error, click.BadParameter) and (name := variable(error.ctx, error.param)):
        hints.append(f"from {name}")
    if error.ctx is not None:
        hints.append(f"see {error.ctx.command_path} --help")
    message = error.format_message().rstrip(".")
    return f"{message} ({'; '.join(hints)})" if hints else message, "Error"


def _exit(code: int, message: str = "", who: str = "kvq") -> None:
    if message:
        from kvq.runtime.errors import one_line

        # An argument that click repeats may be a name from anywhere, as shells put them in for `*`.
        click.echo(f"{who}: {one_line(' '.join(message.split()))}", err=True)
    sys.exit(code)
