"""Time from a command to the first token after a prompt: interpreter, imports, model, prompt, in a process of its own.

    python -m kvq.bench.cold --shape smollm-135m --prompt 512,2048

Every arm begins anew each time, in turn with the others, its files in the system's cache. Of kvq the time runs from the
start of the process; of a peer only from where its process has come up with kvq's own modules, which it would not need.
`loaded` is what an arm takes until it has its model. Exit codes as those of `kvq.bench.decode`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import numpy as np

from kvq.bench.arm import arms as known_arms
from kvq.bench.decode import SHAPE
from kvq.bench.options import HELP, Refused, cache_option, counts, json_option, names, threads_option
from kvq.bench.process import ChildError
from kvq.bench.report.tables import Columns, Results, Row, number, quartiles
from kvq.bench.schedule import Run, in_turn
from kvq.bench.shapes import LONGEST, ROOM
from kvq.runtime.errors import KvqError

ARMS = "kvq-int8,kvq-adaptive,genai,openvino,openvino-f16,llama-f16,llama-q8_0,ort-gqa-int8"
COLUMNS: Columns = {
    "arm": lambda row: row["arm"],
    "prompt": number("context", ",d", 1),
    "loaded, s": lambda row: quartiles(row["loaded_s"], ".2f"),
    "first token, s": lambda row: quartiles(row["first_s"], ".2f"),
    "of the first arm's": lambda row: quartiles(row["ratios"], ".2f"),
}


def begin(run: Run, arm: str, ids: list[int]) -> tuple[float, float]:
    """Seconds until an arm has loaded its model, and until it has its first logits."""
    begun = time.perf_counter()
    with run.child(arm) as child:
        if not arm.startswith("kvq-"):
            child.ask("made")
            begun = time.perf_counter()
        child.ask("load")
        loaded = time.perf_counter() - begun
        child.ask("prefill", ids=ids, room=1)
        return loaded, time.perf_counter() - begun


@click.command(context_settings=HELP)
@click.option("--shape", default="smollm-135m", show_default=True, callback=SHAPE, help="As of kvq.bench.decode.")
@click.option("--prompt", default="512,2048", show_default=True, callback=counts("prompt", LONGEST), help="Tokens.")
@click.option("--arms", default=ARMS, show_default=True, callback=names("arm", lambda text: known_arms()))
@click.option("--rounds", default=5, show_default=True, help="Starts of each arm, after one that is not counted.")
@threads_option
@cache_option
@json_option
def main(shape, prompt, arms, rounds, threads, cache, json_file) -> None:
    """Measure cold starts, arms interleaved in one run."""
    if rounds < 1:
        raise Refused(f"rounds must be at least 1, got {rounds}")
    try:
        run = Run(shape[0], arms, prompt, threads, cache, say=lambda line: click.echo(line, err=True))
    except KvqError as error:
        raise Refused(str(error)) from None
    if max(prompt) > (most := run.assets.fields["max_position_embeddings"] - ROOM):
        raise Refused(f"{shape[0]} has room for {most} tokens; leave out {max(prompt)}")
    run.prepare()
    results = Results(COLUMNS, json_file)
    for length in prompt:
        for row in measure(run, length, rounds):
            results.add(row)
    for arm, reason in run.skipped.items():
        click.echo(f"{arm}: skipped, {reason}")
    sys.exit(1 if run.wrong or not results.rows else 0)


def measure(run: Run, length: int, rounds: int) -> list[Row]:
    """Rows of all arms at one length of the prompt."""
    ids = np.random.default_rng(0).integers(0, run.assets.fields["vocab_size"], length).tolist()
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in run.arms}
    for turn in range(rounds + 1):
        for arm in in_turn(run.arms, turn, run.skipped):
            run.say(f"{arm}: start {turn} of {rounds}, {length} tokens")
            try:
                seconds = begin(run, arm, ids)
            except ChildError as error:
                run.skipped[arm] = str(error)
                continue
            if turn:
                taken[arm].append(seconds)
    rows: list[dict[str, Any]] = []
    for arm in (arm for arm in run.arms if arm not in run.skipped):
        loaded, first = ([float(each) for each in column] for column in zip(*taken[arm], strict=True))
        against = rows[0]["first_s"] if rows else first
        ratios = [mine / its for mine, its in zip(first, against, strict=True)]
        rows.append({"arm": arm, "context": length, "loaded_s": loaded, "first_s": first, "ratios": ratios})
    return rows


if __name__ == "__main__":
    main()
