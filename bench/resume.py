"""What a session file saves: time to the first token after loading it, beside reading the text again.

    python -m kvq.bench.resume --tokens 512,2048

For the embedded model and a random-weight model of SmolLM-135M's shape (int4 weights, made on first
use). Times are medians, with the model loaded and the file in the page cache; each resumed
session first has to continue exactly as the saved one. The table goes to stdout.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from kvq.bench.shapes import assets, default_cache, make_bundle
from kvq.runtime.session.statistics import size

GREEDY = {"temperature": 0, "ignore_eos": True}
CHECKED = 8  # tokens that have to be the same
POLICIES = {"fp16": {}, "int4": {}, "adaptive": {"kv_bits": 3.25}}


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def measure(model, policy: str, tokens: int, path: Path) -> list[str]:
    """One row of the table."""
    if policy == "adaptive" and policy not in model.bundle.manifest.controllers:
        policy, options = "rule", POLICIES[policy]  # random weights have no controller; the bytes are the same
    else:
        options = POLICIES[policy]
    tokens = min(tokens, model.architecture.context - CHECKED)
    ids = np.random.default_rng(0).integers(1, model.architecture.vocab, tokens)

    def first_token(session, prompt=None) -> None:
        next(session.generate(prompt, max_tokens=1, **GREEDY))

    session = model.session(policy, **options)
    session.append(ids)
    save = milliseconds(lambda: session.save(path), 3)
    nbytes = path.stat().st_size
    loaded = model.load_session(path)
    runs = [[r.token for r in s.generate(None, max_tokens=CHECKED, **GREEDY)] for s in (session, loaded)]
    if runs[0] != runs[1]:
        raise click.ClickException(f"{policy} at {tokens} tokens: a loaded session continues with other tokens")
    resume = milliseconds(lambda: first_token(model.load_session(path)), 7)
    again = milliseconds(lambda: first_token(model.session(policy, **options), ids), 3)
    name = " ".join([policy, *(f"at {value} bits" for value in options.values())])
    return [
        f"{tokens:,}",
        name,
        size(nbytes),
        f"{save:.0f}",
        f"{resume:.1f}",
        f"{again:,.0f}",
        f"{again / resume:,.0f}",
    ]


@click.command()
@click.option("--tokens", default="512,2048", show_default=True, help="Lengths of the text.")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("kvq-books", "smollm-135m"),
    show_default=True,
    help="Bundle, embedded model, or smollm-135m for random weights; can be repeated.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Where made models are kept.")
def main(tokens, models, cache) -> None:  # fmt: skip
    """Print size of session files, and time to the first token with and without them."""
    import kvq

    click.echo("| model | tokens | policy | file | save, ms | load to first token, ms | read again, ms | times |")
    click.echo("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            reference = name
            if name == "smollm-135m":
                made = assets(name, cache or default_cache())
                make_bundle(made)
                reference = str(made.bundle)
            model = kvq.load(reference)
            model.session().append(np.arange(1, 129))  # loads the graphs and touches the weights
            for length in map(int, tokens.split(",")):
                for policy in POLICIES:
                    row = measure(model, policy, length, Path(folder) / "session.kvq")
                    click.echo("| " + " | ".join([Path(name).name, *row]) + " |")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
