"""What a session file saves: time to the first token after loading it, beside reading the text again.

    python -m kvq.bench.resume --tokens 512,2048

For the embedded model and a random-weight model of SmolLM-135M's shape (int8 weights, made on first use). Times are
medians, with the model loaded and the file in the page cache; each resumed session first has to continue exactly as the
saved one. The table goes to stdout.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

import kvq
from kvq.bench.floor import taken
from kvq.bench.options import HELP, cache_option, counts, json_option
from kvq.bench.report.tables import Columns, Results, Row, number
from kvq.bench.shapes import assets, make_bundle
from kvq.runtime.session.statistics import size

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
MODEL, DEFAULT = "Bundle, embedded model, or smollm-135m for random weights", ("kvq-books", "smollm-135m")
CHECKED = 8  # tokens that have to be the same
POLICIES: dict[str, dict[str, Any]] = {"fp16": {}, "int4": {}, "adaptive": {"kv_bits": 3.25}}
COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "tokens": number("tokens", ",d", 1),
    "policy": lambda row: row["policy"] + "".join(f" at {bits} bits" for bits in [row["kv_bits"]] if bits),
    "file": lambda row: size(row["file_bytes"]),
    "save, ms": number("save_ms", ".0f"),
    "load to first token, ms": number("resume_ms", ".1f"),
    "read again, ms": number("again_ms", ",.0f"),
    "times": lambda row: f"{row['again_ms'] / row['resume_ms']:,.0f}",
}


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    return 1e3 * statistics.median(taken(work) for _ in range(repeats))


def measure(model: kvq.Model, policy: str, tokens: int, path: Path) -> Row:
    """One row of the table, without the model's name."""
    options = POLICIES[policy]
    if policy == "adaptive" and policy not in model.bundle.manifest.controllers:
        policy = "rule"  # random weights have no controller; the bytes are the same
    tokens = min(tokens, model.architecture.context - CHECKED)
    ids = np.random.default_rng(0).integers(1, model.architecture.vocab, tokens)

    def first_token(session: kvq.Session, prompt=None) -> None:
        next(session.generate(prompt, max_tokens=1, **GREEDY))

    session = model.session(policy, **options)
    session.append(ids)
    row = {"tokens": tokens, "policy": policy, "kv_bits": options.get("kv_bits")}
    row["save_ms"] = milliseconds(lambda: session.save(path), 3)
    row["file_bytes"] = path.stat().st_size
    loaded = model.load_session(path)
    runs = [[r.token for r in s.generate(None, max_tokens=CHECKED, **GREEDY)] for s in (session, loaded)]
    if runs[0] != runs[1]:
        raise click.ClickException(f"{policy} at {tokens} tokens: a loaded session continues with other tokens")
    row["resume_ms"] = milliseconds(lambda: first_token(model.load_session(path)), 7)
    row["again_ms"] = milliseconds(lambda: first_token(model.session(policy, **options), ids), 3)
    return row


@click.command(context_settings=HELP)
@click.option("--tokens", default="512,2048", show_default=True, callback=counts("text"), help="Lengths of the text.")
@click.option("--model", "models", multiple=True, default=DEFAULT, show_default=True, help=f"{MODEL}; can be repeated.")
@cache_option
@json_option
def main(tokens, models, cache, json_file) -> None:
    """Print size of session files, and time to the first token with and without them."""
    results = Results(COLUMNS, json_file)
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            reference = name
            if name == "smollm-135m":
                made = assets(name, cache)
                make_bundle(made)
                reference = str(made.bundle)
            model = kvq.load(reference)
            model.session().append(np.arange(1, 129))  # loads the graphs and touches the weights
            for length in tokens:
                for policy in POLICIES:
                    row = measure(model, policy, length, Path(folder) / "session.kvq")
                    results.add({"model": Path(name).name} | row)


if __name__ == "__main__":
    main()
