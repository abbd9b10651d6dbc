"""Two checkouts of kvq side by side, to show what a change costs.

    python -m kvq.bench.compare A B --model BUNDLE --rounds 10 --json compare.json

A and B are folders, each with its own native library built in it. Each has a process with the model loaded, and new
processes for what a start costs; they take turns, A B B A and so on, so that both see the same state of the machine. A
first turn is not counted. Ratios are B / A turn by turn: their median, in brackets their quartiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvq.bench.kvq import checkout
from kvq.bench.machine import machine
from kvq.bench.options import FILE, HELP, Refused, counts, json_option, names, threads_option
from kvq.bench.process import Child
from kvq.bench.report.tables import Columns, Results, Row, number, quarters, quartiles
from kvq.bench.schedule import in_turn

EMBEDDED = "kvq-books"
OPTIONS: dict[str, dict[str, Any]] = {"adaptive": {"kv_bits": 3.25}}
COLUMNS: Columns = {
    "measure": lambda row: row["measure"],
    "policy": lambda row: row["policy"],
    "tokens": number("tokens", "d", 1),
    "A": number("a_median", ".2f"),
    "B": number("b_median", ".2f"),
    "B / A": lambda row: quartiles(row["ratios"], ".3f"),
}


class Comparison:
    """Turns of two checkouts.

    Args:
        folders: A and B, in absolute form.
        model: bundle, or name of the embedded one.
        threads: of both.
        policies: names.
        say: called with a line of progress.

    Attributes:
        values: (measure, policy, tokens) -> side -> its value of each turn; policy and tokens as far as they matter.

    Raises:
        Refused: a folder is no checkout, or one has its native library and the other does not.
        ChildError: a process failed.
    """

    def __init__(
        self, stack: ExitStack, folders: dict[str, Path], model: str, threads: int, policies: list[str],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folders, self.threads = folders, threads
        self.values: dict[tuple[str, str, int | None], dict[str, list[float]]] = {}
        job = {"model": model, "threads": threads}
        self._children = {side: stack.enter_context(self._child(side, "Loaded", job)) for side in folders}
        wanted = {policy: OPTIONS.get(policy, {}) for policy in policies}
        self.about = {side: child.ask("about", policies=wanted) for side, child in self._children.items()}
        for side, folder in folders.items():
            if Path(self.about[side]["file"]).resolve() != folder / "kvq" / "__init__.py":
                raise Refused(f"{side}: {folder} is not a checkout of kvq; give the folder with pyproject.toml")
        if len({about["backend"] for about in self.about.values()}) > 1:
            found = ", ".join(f"{side}: {about['backend']}" for side, about in self.about.items())
            raise Refused(f"attention differs ({found}); build the native library in both")
        refused = {policy: reason for about in self.about.values() for policy, reason in about["refused"].items()}
        for policy, reason in refused.items():
            say(f"{policy}: skipped, {reason}")
        self.policies = {policy: options for policy, options in wanted.items() if policy not in refused}

    def _child(self, side: str, name: str, job: dict[str, Any]) -> Child:
        return Child(f"{checkout.__file__}:{name}", job, self.threads, self.folders[side])

    def _keep(self, side: str, value: float, measure: str, policy: str = "", tokens: int | None = None) -> None:
        self.values.setdefault((measure, policy, tokens), {s: [] for s in self.folders})[side].append(value)

    def start(self, turn: int) -> None:
        """A new process for each: import, and the first token since it started."""
        for side in in_turn(self.folders, turn):
            begun = time.perf_counter()
            with self._child(side, "Fresh", {}) as child:
                answer = child.ask("first_token", model=EMBEDDED)
                self._keep(side, 1e3 * (time.perf_counter() - begun), "first token, ms")
            self._keep(side, answer["import"], "import, ms")

    def run(self, turn: int, context: int, steps: int) -> None:
        """Prefill and decode of each policy."""
        tokens = min([context, *(about["context"] - steps for about in self.about.values())])
        ids = np.random.default_rng(turn).integers(1, 256, tokens).tolist()
        for policy, options in self.policies.items():
            for side in in_turn(self.folders, turn):
                answer = self._children[side].ask("measure", policy=policy, options=options, ids=ids, steps=steps)
                self._keep(side, tokens / answer["prefill"], "prefill, tokens/s", policy, tokens)
                # Their mean, as every sixteenth step may choose precisions for sixteen tokens.
                self._keep(side, 1e3 * float(np.mean(answer["steps"][1:])), "decode, ms/token", policy, tokens)

    def rows(self) -> list[Row]:
        """Of each measure the values of the counted turns, their medians, and the ratios."""
        rows = []
        for (measure, policy, tokens), sides in self.values.items():
            a, b = (np.array(sides[side][1:]) for side in self.folders)
            row = {"measure": measure, "policy": policy, **({"tokens": tokens} if tokens else {})}
            row |= {"a": a.tolist(), "b": b.tolist(), "a_median": float(np.median(a)), "b_median": float(np.median(b))}
            p25, median, p75 = quarters(b / a)
            row |= {"ratios": (b / a).tolist(), "ratio_p25": p25, "ratio_median": median, "ratio_p75": p75}
            rows.append(row)
        return rows


@click.command(context_settings=HELP)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--model", default=EMBEDDED, show_default=True, help="Bundle; starts are measured on the embedded model.")
@click.option("--policies", default="int4,mixed,adaptive,fp16", show_default=True, callback=names("policy"))
@click.option("--context", default="512,2048", show_default=True, callback=counts("context"), help="Cached tokens.")
@click.option("--rounds", default=10, show_default=True, help="Counted turns of each checkout.")
@click.option("--steps", default=33, show_default=True, help="Decode steps of a turn; the first is not counted.")
@threads_option
@json_option
def main(a, b, model, policies, context, rounds, steps, threads, json_file) -> None:
    """Compare checkouts A and B: decode, prefill, import, first token. `adaptive` has 3.25 bits a value."""
    if rounds < 1 or steps < 2:
        raise Refused(f"rounds must be at least 1 and steps at least 2, got {rounds} and {steps}")
    folders = {"A": a.resolve(), "B": b.resolve()}
    model = str(Path(model).resolve()) if Path(model).exists() else model

    def say(line: str) -> None:
        click.echo(line, err=True)

    with ExitStack() as stack:
        comparison = Comparison(stack, folders, model, threads, policies, say)
        for turn in range(rounds + 1):
            say(f"round {turn} of {rounds}")
            comparison.start(turn)
            for length in context:
                comparison.run(turn, length, steps)
    what = {"model": model, "threads": threads, "steps": steps, "about": comparison.about}
    results = Results(COLUMNS, json_file)
    for row in comparison.rows():
        results.add(row | {"run": machine() | what | {side: str(folder) for side, folder in folders.items()}})


if __name__ == "__main__":
    main()
