"""What drafts from the text itself gain where an answer copies, and what they cost where it does not.

    python -m kvq.bench.drafts --model BUNDLE --text FILE --json drafts.json

The text is read up to so many tokens, and then answers are said that a good model would give: the same text with a word
replaced, quotations out of it, a summary made of half sentences, code with a name replaced, and prose: how the text
goes on. These answers are fixed, whatever the model thinks, so that they are what the task asks for and no loop of a
weak model; `free` is what it says itself, drawn at temperature 0.8. With drafts and without take turns on forks of one
session, and the tokens have to be the same. The ratio is time without drafts / with, turn by turn: above 1 drafts gain.
"""

from __future__ import annotations

import inspect
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np

import kvq
from kvq.bench.machine import machine
from kvq.bench.options import FILE, HELP, Refused, counts, json_option, names, threads_option
from kvq.bench.report import page
from kvq.bench.report.tables import Columns, Results, Row, number, quarters, quartiles
from kvq.bench.schedule import in_turn
from kvq.exporter.calibration import calibration_text

OPTIONS: dict[str, dict[str, Any]] = {"adaptive": {"kv_bits": 3.25}}
ARMS = ("off", "auto")
CHARACTERS = 16  # of a text that are read for a token that is needed
COLUMNS: Columns = {
    "task": lambda row: row["task"],
    "policy": lambda row: row["policy"],
    "tokens": number("tokens", ",d", 1),
    "off, ms/token": number("off_ms", ".2f"),
    "auto, ms/token": number("auto_ms", ".2f"),
    "off / auto": lambda row: quartiles(row["ratios"], ".2f"),
    "accepted / drafted": lambda row: f"{row['accepted']} / {row['drafted']}",
}


def sentences(text: str) -> list[str]:
    """Its sentences that are worth a quotation."""
    return [each.strip() for each in re.split(r"(?<=[.!?])\s+", text) if len(each.split()) > 5] or [text]


def edited(text: str) -> str:
    """The text with its most frequent long word replaced."""
    words = Counter(word for word in re.findall(r"[A-Za-z]{5,}", text))
    word = max(words, key=lambda each: words[each]) if words else "text"
    return re.sub(rf"\b{word}\b", "zebra", text)


def quoted(text: str) -> str:
    """Every third sentence as a quotation."""
    return "\n".join(f'{i}. "{each}"' for i, each in enumerate(sentences(text)[::3], 1))


def summarised(text: str) -> str:
    """The first halves of every second sentence, with words between them that are not in it."""
    halves = [each.split() for each in sentences(text)[::2]]
    links = ("To begin with,", "It adds that", "The author then notes how", "Moreover,", "In short,")
    return " ".join(f"{links[i % 5]} {' '.join(half[: len(half) // 2])}." for i, half in enumerate(halves))


CODE = inspect.getsource(page)
TASKS: dict[str, Callable[[str], str]] = {"edit": edited, "quote": quoted, "summary": summarised, "code": edited}
EVERY = (*TASKS, "prose", "free")


class Said:
    """A processor of logits that has an answer said, token by token.

    Args:
        begun: tokens before it.
        ids: of the answer.
    """

    def __init__(self, begun: int, ids: list[int]) -> None:
        self._begun, self._ids = begun, ids

    def __call__(self, history: Any, logits: np.ndarray) -> np.ndarray:
        logits[self._ids[len(history) - self._begun]] = np.float32(1e9)
        return logits


def prompts(model: kvq.Model, text: str, tokens: int, wanted: int) -> Iterator[tuple[str, list[int], list[int] | None]]:
    """Task, ids of the prompt, and those of the answer; None: whatever the model says."""
    # Of a book no more than is needed: the model's own `encode` refuses what its context could not hold.
    ids = model.tokenizer.encode(text[: CHARACTERS * (tokens + wanted)]).ids
    if len(ids) < tokens + wanted:
        raise Refused(f"the text has {len(ids)} tokens, {tokens + wanted} are needed; give a longer --text")
    code = model.encode(CODE)
    for task, answer in TASKS.items():
        source = np.resize(code, tokens).tolist() if task == "code" else ids[:tokens]
        said = model.encode(answer(model.tokenizer.decode(source)), beginning=False)
        yield task, source, np.resize(said, wanted).tolist() if len(said) < wanted else said[:wanted]
    yield "prose", ids[:tokens], ids[tokens : tokens + wanted]
    yield "free", ids[:tokens], None


def measure(session: kvq.Session, answer: list[int] | None, wanted: int, rounds: int) -> Row:
    """Times of both arms by turns, the first turn not counted.

    Raises:
        ClickException: the tokens differ.
    """
    values: dict[str, list[float]] = {arm: [] for arm in ARMS}
    drafted = accepted = 0
    for turn in range(rounds + 1):
        told = {}
        for arm in in_turn(ARMS, turn):
            fork = session.fork()
            options: dict[str, Any] = {"temperature": 0.8, "seed": turn}
            if answer is not None:
                options = {"temperature": 0, "logits_processor": Said(len(fork.tokens), answer)}
            begun = time.perf_counter()
            told[arm] = [r.token for r in fork.generate(None, max_tokens=wanted, ignore_eos=True, draft=arm, **options)]
            values[arm].append(1e3 * (time.perf_counter() - begun) / wanted)
            stats = fork.stats()
            drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        if told["off"] != told["auto"]:
            raise click.ClickException(f"drafts change the text: {told}")
    off, auto = (np.array(values[arm][1:]) for arm in ARMS)
    low, median, high = quarters(off / auto)
    row = {"off_ms": float(np.median(off)), "auto_ms": float(np.median(auto)), "ratios": (off / auto).tolist()}
    row |= {"ratio_p25": low, "ratio_median": median, "ratio_p75": high, "off": off.tolist(), "auto": auto.tolist()}
    return row | {"drafted": drafted, "accepted": accepted}


@click.command(context_settings=HELP)
@click.option("--model", default="kvq-books", show_default=True, help="Bundle.")
@click.option("--text", type=FILE, help="Text of the tasks, UTF-8 [the one that exports are calibrated with]")
@click.option("--tasks", default=",".join(EVERY), show_default=True, callback=names("task", lambda text: EVERY))
@click.option("--policies", default="int8,adaptive,fp16", show_default=True, callback=names("policy"))
@click.option("--context", default="512", show_default=True, callback=counts("context"), help="Tokens of prompts.")
@click.option("--tokens", default=200, show_default=True, help="Of an answer.")
@click.option("--rounds", default=5, show_default=True, help="Counted turns.")
@threads_option
@json_option
def main(model, text, tasks, policies, context, tokens, rounds, threads, json_file) -> None:
    """Measure drafts; `adaptive` has 3.25 bits a value."""
    if rounds < 1 or tokens < 2:
        raise Refused(f"rounds must be at least 1 and tokens at least 2, got {rounds} and {tokens}")
    loaded = kvq.load(model, threads=threads)
    try:
        written = calibration_text() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{text} cannot be read ({error})") from None
    results, run = Results(COLUMNS, json_file), machine() | {"model": model, "threads": threads}
    for length in context:
        for task, prompt, answer in prompts(loaded, written, length, tokens):
            if task not in tasks:
                continue
            for policy in policies:
                session = loaded.session(policy, **OPTIONS.get(policy, {}))
                session.append(prompt)
                row = measure(session, answer, tokens, rounds)
                results.add({"task": task, "policy": policy, "tokens": length} | row | {"run": run})


if __name__ == "__main__":
    main()
