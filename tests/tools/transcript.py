"""Writes docs/transcript.md: what a new user types, and what comes back. `python -m tests.tools.transcript`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.tools.serving import served
from tests.tools.tree import ROOT

PAGE = ROOT / "docs" / "transcript.md"
HEAD = """\
# A first hour, as it was typed

Every command here was run, with the model that comes with kvq, by `python -m tests.tools.transcript`, which writes this
page; a test runs them all again. What a command says on stderr stands with the rest. Texts and times are of
one machine.
"""
# What is said of some commands, and the commands. {url} is that of a server that the last of them ask.
STEPS: list[tuple[str, list[str]]] = [
    ("What is here", ["kvq list", "kvq info kvq-books"]),
    (
        "A text goes on, and its cache has fewer bits",
        [
            'kvq-run -m kvq-books -t 0 -n 30 "The ship left the harbour"',
            'kvq-run -m kvq-books -t 0 -n 30 --kv-bits 3.5 "The ship left the harbour"',
            'kvq inspect -m kvq-books --kv-bits 3.5 "The captain looked at the sea"',
        ],
    ),
    (
        "An answer of a form",
        ["kvq-run -m kvq-books -t 0 -q --choice sea --choice shore 'He was at the'",
         "kvq-run -m kvq-books -t 0 -q --regex '[0-9]{4}' 'It was the year'"],
    ),
    ("A chat, here with lines from a pipe", [
        "printf 'Where is the captain?\\nWhy?\\n/context\\n' | kvq chat -m kvq-books -t 0 -n 20"]),
    (
        "Mistakes are told in a line",
        ["kvq-run -m kvq-book Hello", "kvq-run -m kvq-books --kv-bits 1 Hello"],
    ),
    (
        "In a program",
        ["python -c 'import kvq\nmodel = kvq.load(\"kvq-books\")\n"
         "for answer in model.generate_all([\"The sea\", \"Nobody\"], max_tokens=8, temperature=0):\n"
         "    print(answer)'"],
    ),
    (
        "A server: `kvq serve -m kvq-books`, and from another terminal",
        [
            "curl -s {url}/v1/models",
            "curl -s {url}/v1/completions -d '{{\"prompt\": \"The sea\", \"max_tokens\": 8, \"temperature\": 0}}'"
            " -H 'content-type: application/json'",
            "curl -s {url}/v1/models/kvq-book",
        ],
    ),
]  # fmt: skip


def commands() -> list[str]:
    """All of them, as the page has them."""
    return [command.format(url="http://127.0.0.1:8080") if "{url}" in command else command
            for _, several in STEPS for command in several]  # fmt: skip


def ran(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Command, what it said, and its exit code; folder: for programs named kvq, kvq-run and python."""
    python = shlex.quote(sys.executable)
    for name, what in (("kvq", "-m kvq"), ("kvq-run", "-m kvq run"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {python} {what} "$@"\n')
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    with served("-m", "kvq-books", env={"PYTHONPATH": str(ROOT)}) as server:
        for command in commands():
            here = command.replace("http://127.0.0.1:8080", server.url)
            done = subprocess.run(
                here, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                cwd=folder, timeout=120,
            )  # fmt: skip
            yield command, done.stdout.replace(server.url, "http://127.0.0.1:8080").strip("\n"), done.returncode


def page(results: dict[str, str]) -> str:
    """The page of commands and what they said."""
    parts, left = [HEAD], iter(results.items())
    for title, several in STEPS:
        shown = "\n".join("$ {}\n{}".format(*next(left)) for _ in several)
        parts.append(f"\n## {title}\n\n```console\n{shown}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["KVQ_HOME"] = str(Path(scratch, "home"))
        bin_folder = Path(scratch, "bin")
        bin_folder.mkdir()
        PAGE.write_text(page({command: said for command, said, _ in ran(bin_folder)}), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written", file=sys.stderr)
