"""``kvq train-controller``."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import click

from kvq.controller.training.texts import read_text
from kvq.runtime.cli.options import OUTPUT
from kvq.runtime.files import write_atomically


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 calibration text, a few megabytes.")
@click.option(
    "--set",
    "feature_set",
    type=click.Choice(["paper", "extended"]),
    help="Features: extended for adaptive, paper for paper if not given.",
)
@click.option("--objective", type=click.Choice(["adaptive", "paper", "both"]), default="adaptive", show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=200_000, show_default=True, help="Samples, about.")
@click.option(
    "--asked",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the texts that end in questions about what they say.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--add", is_flag=True, help="Keep the network that BUNDLE has: the mean of both errs less than either."
              " Give another text or seed; may be repeated.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
@click.option("--report", **OUTPUT, help="Write settings and loss curves as JSON.")
def train_controller(bundle, text, feature_set, objective, tokens, asked, seed, add, threads, report) -> None:
    """Train the precision controller of BUNDLE on a text and store it there.

    \b
    Example:
      kvq train-controller my-bundle --text books.txt
    """
    content = read_text(text, "--text")
    import torch

    from kvq.controller.training.train import Recipe, train_controllers

    if threads:
        torch.set_num_threads(threads)
    recipes = []
    for name in ["adaptive", "paper"] if objective == "both" else [objective]:
        default_set = {"adaptive": "extended", "paper": "paper"}[name]
        recipe = Recipe(
            feature_set=feature_set or default_set, objective=name, tokens=tokens, asked=asked, seed=seed, add=add
        )
        recipes.append(replace(recipe, rate=1e-3, epochs=10) if name == "paper" else recipe)
    with ExitStack() as stack:
        bar = None

        def progress(done: int, total: int, what: str) -> None:
            nonlocal bar
            if bar is None:  # only now: a refused bundle is one line on stderr
                bar = stack.enter_context(click.progressbar(length=100, label=what, file=sys.stderr))
            bar.label = what
            bar.update(100 * done // total - bar.pos)

        reports = train_controllers(bundle, content, recipes, progress=progress)
    if report is not None:
        write_atomically(report, json.dumps([asdict(r) for r in reports], indent=1))
    for recipe, done in zip(recipes, reports, strict=True):
        best = min(row["valid"] for row in done.curve)
        shares = ", ".join(f"{share:.1%}" for share in done.shares)
        click.echo(
            f"{recipe.objective}: {done.samples} samples, {done.seconds:.0f} s, validation loss {best:.4f},"
            f" shares of its classes {shares}"
        )
