"""Options that commands share, and help in sections."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvq.runtime.bundle.sampling import NAMES as RECOMMENDED
from kvq.runtime.cli.questions import MOST_TEXT
from kvq.runtime.cli.twins import variable
from kvq.runtime.errors import BudgetError, GrammarError
from kvq.runtime.files import read_bounded
from kvq.runtime.policy.base import DEFAULT_POLICY
from kvq.runtime.session.sampling import DEFAULTS

SETTINGS = {"help_option_names": ["-h", "--help"]}


class Option(click.Option):
    """A click option with a section of the help, and aliases that the help leaves out."""

    def __init__(self, *arguments: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        long = [name for name in self.opts if name.startswith("--")]
        if len(long) < 2:
            return super().get_help_record(ctx)
        everything, self.opts = self.opts, [name for name in self.opts if name not in long[1:]]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = everything


class Command(click.Command):
    """A command whose help lists options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title in sorted(sections, key=lambda title: title == "Options"):  # --help and its like come last
            with formatter.section(title):
                formatter.write_dl(sections[title], col_max=26)


class Words(click.ParamType):
    """Text of an option that can be repeated; its environment twin is one value, blanks and all."""

    name = "text"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]


class Size(click.ParamType):
    """A number of bytes, see `nbytes`; one that is none is a `BudgetError`, as other values a budget cannot have."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return nbytes(value) if isinstance(value, str) else value
        except BudgetError as error:
            name = variable(ctx, param)
            raise BudgetError(f"{error} (from {name})" if name else str(error)) from None


class Bias(click.ParamType):
    """A token id and what is added to its logit: "42=-100"."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        token, _, number = value.partition("=")
        try:
            return int(token), float(number)
        except ValueError:
            self.fail(f"{value!r:.60} is no bias; write for example 42=-100", param, ctx)


SIZE = Size()


def option(*names: str, section: str, **attributes: Any) -> Callable:
    """As click.option, in a section of the help."""
    return click.option(*names, cls=Option, section=section, **attributes)


def options(group: Sequence[Callable]) -> Callable:
    """Apply a list of click options in the order they are written."""

    def decorate(function):
        for each in reversed(group):
            function = each(function)
        return function

    return decorate


def _offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    # Where huggingface_hub, and all that is built on it, looks; it is imported only afterwards.
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of models that begin so, for the shell; where there are none it looks for folders."""
    from kvq.runtime.catalog.references import known_names

    named = [CompletionItem(name) for name in known_names() if name.startswith(incomplete)]
    return named or [CompletionItem(incomplete, type="dir")]


def complete_policy(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of policies that begin so, for the shell."""
    import kvq

    return [CompletionItem(name) for name in sorted(kvq.POLICIES) if name.startswith(incomplete)]


OFFLINE = option("--offline", is_flag=True, expose_value=False, callback=_offline, section="Model",
                 help="Fetch nothing; use what is on this machine.")  # fmt: skip
# Which model, and what it runs on.
MODEL = [
    option("-m", "--model", metavar="MODEL", section="Model", shell_complete=complete_model,
           help="Name (kvq list), bundle or checkpoint folder, .gguf file or hub id."),
    OFFLINE,
    option("--threads", type=int, metavar="N", section="Model", help="CPU threads; all available cores if not given."),
]  # fmt: skip


def max_tokens(default: int) -> Callable:
    """The option that bounds a text, by default to so many tokens."""
    return option("-n", "--max-tokens", default=default, metavar="N", show_default=True, section="Sampling",
                  help="Most tokens; -1 fills the context.")  # fmt: skip


def _schema(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The text of a schema: what begins as one is one, all else is a file's name."""
    if value is None or value.lstrip()[:1] == "{" or value.strip() == "true":
        return value
    return _grammar(ctx, param, value)


def _grammar(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The text of a file."""
    if value is None:
        return None
    try:
        return read_bounded(value, MOST_TEXT).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise GrammarError(f"cannot read {value:.200} ({why}); --{param.name} takes a file") from None


SYSTEM = option("--system", metavar="TEXT", section="Basics", help="System prompt: how the model should answer.")
RAW = option("--raw", is_flag=True, section="Basics", help="Go on with the text as it is, without the chat template.")


def _own(name: str) -> str:
    """The default of an option of sampling that a model may recommend otherwise, for a help page."""
    return f"[default: the model's own, else {DEFAULTS[name]:g}]"  # type: ignore[literal-required]


# Names and short forms as in llama.cpp and mlx-lm.
DRAFT = option("--draft", default="auto", metavar="auto|off|N", show_default=True, section="Sampling",
               help="Tokens drafted from the text itself and computed in one pass: as many as pay, none, or N; the "
               "text is the same.")  # fmt: skip
SAMPLING = [
    max_tokens(128),
    option("-t", "--temperature", "--temp", type=float, metavar="X", section="Sampling",
           help=f"0 is greedy. {_own('temperature')}"),
    option("--top-k", type=int, metavar="K", section="Sampling",
           help=f"Keep the k most likely; 0 is all. {_own('top_k')}"),
    option("--top-p", type=float, metavar="P", section="Sampling",
           help=f"Keep the fewest that reach p. {_own('top_p')}"),
    option("--min-p", type=float, metavar="P", section="Sampling",
           help=f"Drop what is below p times the best. {_own('min_p')}"),
    option("--repetition-penalty", "--repeat-penalty", type=float, metavar="X", section="Sampling",
           help=f"1 is off. {_own('repetition_penalty')}"),
    option("--presence-penalty", default=DEFAULTS["presence_penalty"], metavar="X", show_default=True,
           section="Sampling", help="Nats taken from tokens that this text has said."),
    option("--frequency-penalty", default=DEFAULTS["frequency_penalty"], metavar="X", show_default=True,
           section="Sampling", help="The same for every time that it has."),
    option("--logit-bias", multiple=True, type=Bias(), metavar="ID=X", section="Sampling",
           help="Nats added to a token, from -100 to 100; can be repeated."),
    option("-s", "--seed", type=int, metavar="N", section="Sampling", help="Same seed, same text; drawn if not given."),
    option("--stop", multiple=True, type=Words(), metavar="TEXT", section="Sampling",
           help="End before TEXT appears; can be repeated."),
    option("--stop-token", "stop_tokens", multiple=True, type=int, metavar="ID", section="Sampling",
           help="End at a token id; can be repeated."),
    option("--ignore-eos", is_flag=True, section="Sampling", help="Go on past tokens that end a text or an answer."),
    DRAFT,
]  # fmt: skip
CONTEXT_SHIFT = option(
    "--context-shift", is_flag=True, section="Sampling",
    help="Go on where the context is full: the oldest part goes, sinks and system prompt stay.",
)  # fmt: skip
STRUCTURE = [
    option("--schema", metavar="FILE|JSON", section="Structure", callback=_schema,
           help="Keep the answer to a JSON schema; true is any JSON."),
    option("--regex", metavar="REGEX", section="Structure", help="Keep it to a regular expression, all of it."),
    option("--grammar", metavar="FILE", section="Structure", callback=_grammar,
           help="Keep it to a grammar in llguidance's form of Lark."),
    option("--choice", multiple=True, type=Words(), metavar="TEXT", section="Structure",
           callback=lambda ctx, param, value: list(value) or None, help="One of these texts; repeat it."),
]  # fmt: skip
CACHE = [
    option("-p", "--policy", metavar="NAME", section="Cache", shell_complete=complete_policy,
           help="fp16, int8, int4, int3, int2, k8v4 (any pair of widths), mixed, random, rule, paper, adaptive or auto "
           f"(adaptive, or rule for a model without a controller); {DEFAULT_POLICY} if not given, auto with a budget."),
    option("--kv-bits", type=float, metavar="X", section="Cache", help="Keep the cache to X bits per value, all told."),
    option("--kv-memory", type=SIZE, metavar="SIZE", section="Cache", help="Keep it to that many bytes: 32MB, 1GB."),
    option("--recent", default=16, metavar="N", show_default=True, section="Cache",
           help="Newest tokens to protect from a policy's low precisions."),
    option("--sink", default=4, metavar="N", show_default=True, section="Cache", help="First tokens to protect."),
    option("--protect-bits", type=int, metavar="BITS", section="Cache",
           help="8 or 16, of protected tokens; if not given 16 with policies of 8 bits and more, else 8."),
    option("--prefill", default="auto", metavar="HOW", show_default=True, section="Cache",
           help="Read prompts stepwise, as token by token, or chunked, which is faster; auto is stepwise where the "
           "policy looks at tokens."),
    option("--backend", metavar="NAME", section="Cache", help="native or numpy; the fastest if not given."),
]  # fmt: skip


# Arguments of `Model.session`: the names of `CACHE`.
SESSION_SETTINGS = ("policy", "kv_bits", "kv_memory", "recent", "sink", "protect_bits", "prefill", "backend")


def session_settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Model.session`, taken out of a command's parameters, which has all of `CACHE`."""
    return {name: parameters.pop(name) for name in SESSION_SETTINGS}


def generation_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """Options of `Session.generate` of a command's parameters, which are those of `SAMPLING`: what is not given is the
    model's.
    """
    most, bias = parameters["max_tokens"], parameters["logit_bias"]
    given = {name: value for name, value in parameters.items() if value is not None or name not in RECOMMENDED}
    return {**given, "max_tokens": None if most == -1 else most, "logit_bias": dict(bias) or None}


def given(ctx: click.Context) -> set[str]:
    """Names of the options that the user has set, by flag or variable."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}


MOST_BYTES = 1e18


def nbytes(text: str) -> float:
    """Bytes of a size such as "800kB", "8MB", "1 GiB" or a plain number; decimal units as storage is sold.

    Raises:
        BudgetError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmg]?)(i?)b?)\s*", text, re.IGNORECASE)
    if not match:
        raise BudgetError(f"{text[:60]!r} is not a size; write for example 800kB or 32MB")
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " kmg".index(unit.lower() or " ")
    if size > MOST_BYTES:
        raise BudgetError(f"{text[:20]}... is more than any machine has; write for example 800kB or 32MB")
    return size


def in_a_folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """An output path whose folder is there: known now, and not after an hour of work."""
    if path is not None and not path.name:
        raise click.BadParameter("the name of a file is missing; give one")
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}; make it first")
    return path


# Of an option that names a file to write: its folder has to be there.
OUTPUT: dict[str, Any] = {"type": click.Path(dir_okay=False, path_type=Path), "callback": in_a_folder}
