"""Options and helpers that commands of ``kvq eval`` share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from kvq.runtime.cli.options import MODEL as MODEL_OPTIONS
from kvq.runtime.cli.options import OUTPUT, options
from kvq.runtime.files import write_atomically


def write_json(path: Path | None, value: object) -> None:
    """JSON to a file, complete or not at all; to stdout without one."""
    text = json.dumps(value, indent=1) + "\n"
    if path is None:
        click.echo(text, nl=False)
        return
    write_atomically(path, text)


def say(table: str) -> None:
    """A table to stdout; to a terminal what it can show, as names in it come from files."""
    from kvq.runtime.text.cells import visible

    click.echo(visible(table) if sys.stdout.isatty() else table, color=True)  # click is to take nothing out


def write_rows(path: Path | None, rows: list[dict], table: Callable[[list[dict]], str]) -> None:
    """The rows to a file and a table of them to stdout; without a file the rows to stdout."""
    write_json(path, rows)
    if path is not None:
        say(table(rows))


@contextmanager
def bar():
    """A progress callback that draws on stderr once it is first called, and a new bar where work begins anew."""
    with ExitStack() as stack:
        shown = None

        def progress(done: int, total: int, what: str) -> None:
            nonlocal shown
            at = 100 * done // total
            if shown is None or at < shown.pos:  # a bar cannot go back
                stack.close()
                shown = stack.enter_context(click.progressbar(length=100, label=what, file=sys.stderr))
            shown.label = what
            shown.update(at - shown.pos)

        yield progress


def numbers(text: str, option: str, kind: type = float) -> list:
    """Numbers with commas between them, as an option has them."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{option} takes numbers with commas between them, got {text!r:.60}") from None
    if any(not number > 0 for number in found):
        raise click.UsageError(f"{option} takes positive numbers, got {text!r:.60}")
    return found


MOST_ITEMS = 1 << 16  # chunks or documents: lists are made of them
MODEL = options(MODEL_OPTIONS)
TEXT = click.option("--text", "texts", required=True, multiple=True, type=click.Path(path_type=Path),
                    help="UTF-8 text to score; can be repeated.")  # fmt: skip
CONTEXT = click.option("--context", default="512", show_default=True, help="Tokens of a chunk; several with commas.")
CHUNKS = click.option(
    "--chunks",
    "count",
    type=click.IntRange(1, MOST_ITEMS),
    default=16,
    show_default=True,
    help="Chunks, spread over the texts.",
)
RECENT = click.option(
    "--recent", type=click.IntRange(0), default=16, show_default=True, help="Newest tokens to protect, in every arm."
)
SINK = click.option(
    "--sink", type=click.IntRange(0), default=4, show_default=True, help="First tokens to protect, in every arm."
)


def _protect(unless_given: str) -> Callable:
    """--protect-bits, with what holds if it is not given."""
    return click.option(
        "--protect-bits", type=click.Choice(["8", "16"]), callback=lambda ctx, parameter, bits: bits and int(bits),
        help=f"Of protected tokens; if not given {unless_given}. Always 16 in the fp16 arm.",
    )  # fmt: skip


PROTECT = _protect("16 with policies of 8 bits and more and with budgets above 8, else 8")
PROTECT_EQUAL = _protect("16 with policies of 8 bits and more, else 8, and 8 with any budget: arms are at equal bytes")
EXACT = click.option(
    "--exact-activations", "exact", is_flag=True, help="Keep activations in float32 in all products, whatever the"
    " bundle says: what the cache does without their rounding. Slow with 8-bit weights.",
)  # fmt: skip
BUDGETS = click.option(
    "--kv-bits", default="", callback=lambda ctx, parameter, text: numbers(text, "--kv-bits") if text else [],
    help="Budgets of the policies that can follow one, total bits per value, with commas; their own choice if not"
    " given.",
)  # fmt: skip
SEED = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
JSON = click.option("--json", "out", **OUTPUT, envvar="KVQ_JSON_FILE", help="Write the result there; else to stdout.")


def protected(recent: int, sink: int, protect_bits: int | None) -> dict[str, int | None]:
    """What is protected, as arguments of `Model.session`."""
    return {"recent": recent, "sink": sink, "protect_bits": protect_bits}


def arms_of(model, policies, budgets: list[float], protected: dict) -> list[tuple[str, dict]]:
    """Policies with what is protected; one that can follow a budget once for each, if there are any."""
    from kvq.controller.evaluation.scoring import REFERENCE
    from kvq.controller.policies import ScoredPolicy, make_policy

    arms = []
    for name in dict.fromkeys(policies):
        policy = make_policy(name, model.bundle)
        for budget in budgets if budgets and isinstance(policy, ScoredPolicy) else [None]:
            arms.append((name, protected | ({} if budget is None else {"kv_bits": budget})))
            if name == REFERENCE and protected.get("protect_bits"):
                arms[-1][1]["protect_bits"] = 16
            model.session(name, **arms[-1][1])  # what cannot be is refused before anything is read
    return arms
