"""The counts in docs/security.md: ``python -m tests.tools.counts`` writes them anew.

What is tried is counted off the tests; runs too long for them stand in tests/fuzz/runs.json, where
``python -m tests.fuzz.long`` adds its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sized
from dataclasses import dataclass
from importlib import import_module

from tests.tools.kills import recorded
from tests.tools.tree import DOCS, ROOT

PAGE = DOCS / "security.md"
RUNS = ROOT / "tests" / "fuzz" / "runs.json"
HEADING = "## Counts\n"
BUNDLES = ("controllers", "ends", "manifests", "operators", "products", "weights", "wire_format")
# What -> (module of tests, names of the tables that its cases come from).
TRIED: dict[str, list[tuple[str, str]]] = {
    "malformed bundles by name": [(f"tests.attacks.test_{name}", "ATTACKS") for name in BUNDLES],
    "chat templates without end": [("tests.attacks.test_templates", "BOMBS")],
    "operations of chat templates that take long": [("tests.attacks.test_template_operations", "ATTACKS")],
    "chat templates that add to their allowance": [
        ("tests.attacks.test_template_allowances", name) for name in ("WAYS", "NAMES")
    ],
    "chat templates that are long to compile": [("tests.attacks.test_templates", "SOURCES")],
    "tokenizers": [("tests.attacks.test_tokenizers", "BAD")],
    "tokenizers whose work multiplies": [("tests.attacks.test_tokenizer_growth", "BAD")],
    "checkpoints": [("tests.attacks.test_checkpoints", name) for name in ("ATTACKS", "METADATA")],
    "session files of a stranger": [("tests.attacks.test_sessions", "ATTACKS")],
    "conversations in session files": [("tests.attacks.test_sessions", "CONVERSATIONS")],
    "session files that are damaged": [("tests.session.test_damaged_files", name) for name in ("BYTES", "TEXTS")],
    "session files with right digests": [("tests.session.test_forged_files", name) for name in ("HEADERS", "ARRAYS")],
    "structures that take exponential work": [("tests.text.test_grammar", "BOMBS")],
    "profiles and turns of keys": [
        ("tests.attacks.test_precisions", name) for name in ("PROFILES", "TURNS", "HEADERS")
    ],
    "lines of a batch": [("tests.attacks.test_batch_lines", "LINES")],
    "files of a batch": [("tests.attacks.test_batch_lines", "FILES")],
    "requests to several models": [("tests.attacks.test_fleet", "REQUESTS")],
    "registries, choices and references of models": [
        ("tests.attacks.test_catalog", name) for name in ("REGISTRIES", "CHOICES", "REFERENCES")
    ],
    "histories of a chat": [("tests.attacks.test_catalog", "HISTORIES")],
    "commands of a chat that do not end well": [("tests.cli.test_chat_tools", "COMMANDS")],
}
KILLED_EXPORTS = "tests.exporter.test_killed_exports"
# Killed by a signal at some moment -> (what is found afterwards, where, tables whose lengths are multiplied).
MOMENTS: dict[str, tuple[str, str, list[str]]] = {
    "export, at a step of it": (
        "nothing, and a folder that the next export removes",
        "tests.exporter.test_killed_exports",
        ["STEPS"],
    ),
    "export, by SIGTERM and SIGINT": ("likewise", KILLED_EXPORTS, ["SIGNALS"]),
    "saves of a session, one behind the other": (
        "the old file or the new one",
        "tests.attacks.test_sessions",
        ["SIGNALS", "DELAYS"],
    ),
    "batch of 500 prompts, killed and begun again": (
        "in the end every answer once",
        "tests.cli.test_batch_kills",
        ["KILLS"],
    ),
}


@dataclass(frozen=True)
class Run:
    """A run that was made once, or several added up.

    Attributes:
        what: was run.
        count: of runs, in words or as a number.
        seconds: of all of them together; 0: not taken.
        command: that does it again.
    """

    what: str
    count: int | str
    seconds: float
    command: str


def tried() -> dict[str, int]:
    """What is tried by the tests -> how many of it."""
    found = {}
    for what, places in TRIED.items():
        tables: list[Sized] = [getattr(import_module(module), name) for module, name in places]
        found[what] = sum(map(len, tables))
    return found


def runs() -> list[Run]:
    """The recorded runs."""
    return [Run(**row) for row in json.loads(RUNS.read_text(encoding="utf-8"))]


def record(run: Run) -> None:
    """Add a run to the recorded ones; counts and seconds of the same are added up."""
    rows = {each.what: each for each in runs()}
    before = rows.get(run.what)
    if before is not None and isinstance(before.count, int) and isinstance(run.count, int):
        run = Run(run.what, before.count + run.count, before.seconds + run.seconds, run.command)
    rows[run.what] = run
    RUNS.write_text(json.dumps([vars(each) for each in rows.values()], indent=1) + "\n", encoding="utf-8")


def kills() -> list[str]:
    """Rows of the table of kills."""
    rows = [
        f"| {row.what}: before every step | {row.kills} | {row.old} times the old, {row.new} times the new, whole |"
        " `tests/attacks/test_kills.py` |"
        for row in recorded()
    ]
    for what, (found, module, names) in MOMENTS.items():
        values = [getattr(import_module(module), name) for name in names]
        number = math.prod(value if isinstance(value, int) else len(value) for value in values)
        rows.append(f"| {what} | {number} | {found} | `{module.replace('.', '/')}.py` |")
    return rows


def section() -> str:
    """What stands below HEADING."""
    rows = []
    for what, number in tried().items():
        files = dict.fromkeys(module.replace(".", "/") + ".py" for module, _ in TRIED[what])
        rows.append(f"| {what} | {number:,} | {', '.join(f'`{file}`' for file in files)} |")
    long = []
    for run in runs():
        count = f"{run.count:,}" if isinstance(run.count, int) else run.count
        long.append(f"| {run.what} | {count} | {_took(run.seconds)} | `{run.command}` |")
    return "\n".join([
        "Written by `python -m tests.tools.counts`. Each of these is refused with an error of its own, nothing is",
        "written, and it takes less than forty million additions in Python do (`tests/tools/work.py`).", "",
        "| tried by the tests | how many | in |", "|---|---|---|", *rows, "",
        "Writers that were killed. Before every step: of opening, renaming, removing, making folders, changing rights",
        "and synchronising, counted by `python -m tests.tools.kills`; after each kill the next write went through, and",
        "left nothing hidden behind.", "",
        "| killed | kills | found afterwards | in |", "|---|---|---|---|", *kills(), "",
        "Runs too long for the tests, as recorded in `tests/fuzz/runs.json`. None of them crashed, hung, or raised an",
        "exception that is not kvq's own.", "",
        "| run | how many | time | command |", "|---|---|---|---|", *long, "",
    ])  # fmt: skip


def _took(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s" if seconds else ""


def main() -> None:
    """Write the section; what stands above HEADING stays."""
    head = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    PAGE.write_text(f"{head}{HEADING}\n{section()}", encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
