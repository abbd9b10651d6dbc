"""Writes docs/transcript.md: what a new user types, and what comes back. `python -m tests.tools.transcript`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.tools.serving import served
from tests.tools.tree import ROOT

PAGE = ROOT / "docs" / "transcript.md"
ADDRESS = "http://127.0.0.1:8080"
REAL = "smollm2-135m-instruct"
HEAD = """\
# A first hour, as it was typed

Every command here was run by `python -m tests.tools.transcript`, which writes this page, in an environment with the
extras `export`, `schema` and `server` and the packages `openai` and `ollama`; tests run them again: those of kvq-books,
the model that comes with kvq, `tests/docs/test_transcript.py`, those of SmolLM2-135M-Instruct
`tests/real/test_transcript.py`. What a command says on stderr stands with the rest. Texts and times are of one machine
of two cores.
"""
INSTALL = """
## Installed

```console
$ python3 -m venv .venv && . .venv/bin/activate
$ pip install -q -c constraints.txt '.[export,schema,server]' openai ollama
```

What it costs says the [README](../README.md).
"""


class Part(NamedTuple):
    """Commands that belong together. served: whether they ask a server of the model, at `ADDRESS`."""

    title: str
    commands: list[str]
    served: bool = False


BOOKS = [
    Part("What is here", ["kvq list", "kvq info kvq-books"]),
    Part("A text goes on, and its cache has fewer bits", [
        'kvq-run -m kvq-books -t 0 -n 30 "The ship left the harbour"',
        'kvq-run -m kvq-books -t 0 -n 30 --kv-bits 3.5 "The ship left the harbour"',
        'kvq inspect -m kvq-books --kv-bits 3.5 "The captain looked at the sea"',
    ]),
    Part("An answer of a form", [
        "kvq-run -m kvq-books -t 0 -q --choice sea --choice shore 'He was at the'",
        "kvq-run -m kvq-books -t 0 -q --regex '[0-9]{4}' 'It was the year'",
    ]),
    Part("A chat, here with lines from a pipe", [
        "printf 'Where is the captain?\\nWhy?\\n/context\\n' | kvq chat -m kvq-books -t 0 -n 20",
    ]),
    Part("A text longer than the context", [
        'kvq-run -m kvq-books -s 1 -n 2100 --ignore-eos "The ship left the harbour" > story.txt',
        'kvq-run -m kvq-books -s 1 -n 2100 --ignore-eos --context-shift "The ship left the harbour" > story.txt',
        "tail -c 150 story.txt",
    ]),
    Part("A text is kept and goes on another day", [
        'kvq-run -m kvq-books -q -t 0 -n 12 --session story.kvq "The ship left the harbour"',
        'kvq-run -m kvq-books -t 0 -n 12 --session story.kvq " In the evening"',
        "kvq info story.kvq",
    ]),
    Part("Mistakes are told in a line", ["kvq-run -m kvq-book Hello", "kvq-run -m kvq-books --kv-bits 1 Hello"]),
    Part("In a program", [
        "python -c 'import kvq\nmodel = kvq.load(\"kvq-books\")\n"
        "for answer in model.generate_all([\"The sea\", \"Nobody\"], max_tokens=8, temperature=0):\n"
        "    print(answer)'",
    ]),
    Part("A server: `kvq serve -m kvq-books`, and from another terminal", [
        f"curl -s {ADDRESS}/v1/models",
        f"curl -s {ADDRESS}/v1/completions -d '{{\"prompt\": \"The sea\", \"max_tokens\": 8, \"temperature\": 0}}'"
        " -H 'content-type: application/json'",
        f"curl -s {ADDRESS}/v1/models/kvq-book",
    ], served=True),
]  # fmt: skip

WEATHER = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
TOOLS = (
    '[{"name": "weekday", "description": "The day of the week of a date", "command": ["date", "-d", "{date}", "+%A"],\n'
    '  "parameters": {"type": "object", "properties": {"date": {"type": "string"}}, "required": ["date"]}}]'
)
BATCH = "\n".join(
    f'{{"custom_id": "{name}", "method": "POST", "url": "/v1/chat/completions", "body": {{"temperature": 0,'
    f' "max_tokens": 20, "messages": [{{"role": "user", "content": "What is the capital of {name}?'
    ' Answer in one sentence."}]}}'
    for name in ("France", "Italy")
)
OPENAI = f'''\
import openai

client = openai.OpenAI(base_url="{ADDRESS}/v1", api_key="none")
question = [{{"role": "user", "content": "What is the weather in Paris?"}}]
options = {{"model": "{REAL}", "messages": question, "temperature": 0}}
for part in client.chat.completions.create(**options, max_tokens=20, stream=True):
    print(part.choices[0].delta.content or "", end="|")
print()
tool = {{"type": "function", "function": {{"name": "get_weather", "parameters": {WEATHER}}}}}
done = client.chat.completions.create(**options, tools=[tool], tool_choice="required", parallel_tool_calls=False)
print(done.choices[0].message.tool_calls[0].function)'''
OLLAMA = f'''\
import ollama

question = [{{"role": "user", "content": "What is the capital of France? Answer in one sentence."}}]
print(ollama.Client("{ADDRESS}").chat("{REAL}", question, options={{"temperature": 0}}).message.content)'''


def program(name: str, text: str) -> str:
    """A command that writes a file."""
    return f"cat > {name} << 'END'\n{text}\nEND"


TALK = [
    Part("A model that knows something", [
        f"kvq pull {REAL}",
        'kvq-run -t 0 "What is the capital of France? Answer in one sentence."',
        'kvq-run -t 0 --kv-bits 3.25 "What is the capital of France? Answer in one sentence."',
        f"kvq show {REAL}",
    ]),
    Part("It answers in JSON of a schema", [
        "kvq-run -q -t 0 --schema '{\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\"}},"
        ' "required": ["city"], "additionalProperties": false}\' "What is the capital of France?"',
        'kvq-run -q -t 0 --regex \'[0-9]{4}\' "In which year did the French Revolution begin?"',
    ]),
    Part("A chat that may ask for commands", [
        program("tools.json", TOOLS),
        "printf 'What day of the week was 2024-02-29?\\n' | kvq chat -t 0 -n 40 --tools tools.json",
    ]),
    Part("A document is read once, and asked about", [
        "kvq prefill LICENSE -o licence.kvq --kv-bits 4.25",
        'kvq-run --session licence.kvq --session-readonly -t 0 "Who owns the copyright of a contribution?"',
        "printf 'My name is Ann.\\n' | kvq chat -q -t 0 -n 20 --session talk.kvq",
        "printf 'What did I say?\\n' | kvq chat -t 0 -n 20 --session talk.kvq",
    ]),
    Part("A file of requests", [
        program("requests.jsonl", BATCH),
        "kvq batch requests.jsonl answers.jsonl",
        "grep -o '\"custom_id\":[^,]*\\|\"content\":[^,]*' answers.jsonl",
    ]),
    Part(f"A server: `kvq serve -m {REAL}`, and from another terminal", [
        program("ask.py", OPENAI),
        "python ask.py",
        program("ask_ollama.py", OLLAMA),
        "python ask_ollama.py",
        f"curl -s {ADDRESS}/api/tags",
    ], served=True),
]  # fmt: skip


def ran(parts: list[Part], folder: Path, model: str, environment: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """Command, what it said, and its exit code.

    Args:
        parts: of one model.
        folder: where they are run, and where programs named kvq, kvq-run and python are put.
        model: that the server has.
        environment: besides this process's.
    """
    python = shlex.quote(sys.executable)
    for name, what in (("kvq", "-m kvq"), ("kvq-run", "-m kvq run"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {python} {what} "$@"\n')
        (folder / name).chmod(0o755)
    (folder / "LICENSE").write_text((ROOT / "LICENSE").read_text())
    environment = {**environment, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    whole = {**os.environ, **environment, "PATH": f"{folder}:{os.environ['PATH']}"}

    def run(command: str, address: str) -> tuple[str, str, int]:
        done = subprocess.run(
            command.replace(ADDRESS, address), shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=whole, cwd=folder, timeout=600,
        )  # fmt: skip
        said = done.stdout.replace(address, ADDRESS).replace(environment.get("KVQ_HOME", ADDRESS), "~/.cache/kvq")
        return command, said.strip("\n"), done.returncode

    for part in parts:
        if not part.served:
            yield from (run(command, ADDRESS) for command in part.commands)
            continue
        with served("-m", model, env=environment) as server:
            for command in part.commands:
                # Programs that were written have the address in them.
                yield run(command, server.url)


def page(results: dict[str, str], parts: list[Part]) -> str:
    """Commands and what they said."""
    found = ""
    for part in parts:
        shown = "\n".join(f"$ {command}\n{results[command]}".rstrip("\n") for command in part.commands)
        found += f"\n## {part.title}\n\n```console\n{shown}\n```\n"
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        text, kept = HEAD + INSTALL, os.environ.get("KVQ_TEST_HOME", str(Path(scratch, "home")))
        for parts, model in ((BOOKS, "kvq-books"), (TALK, REAL)):
            folder, home = Path(scratch, model), {"KVQ_HOME": kept if parts is TALK else str(Path(scratch, "empty"))}
            folder.mkdir()
            text += page({command: said for command, said, _ in ran(parts, folder, model, home)}, parts)
        PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written", file=sys.stderr)
