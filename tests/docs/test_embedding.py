"""The programs of docs/embedding.md, run as they stand there and checked as a strict user's code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.tree import PACKAGES, ROOT

PROGRAMS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "embedding.md").read_text("utf-8"), re.S | re.M)
README = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.S | re.M)


def program(path: Path, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_there_are_six_programs():
    assert len(PROGRAMS) == 6
    assert len(PROGRAMS[0].splitlines()) == 15


@pytest.mark.slow
@pytest.mark.parametrize("code", PROGRAMS, ids=["script", "worker", "service", "many", "policy", "step"])
def test_a_program_runs(code, tmp_path):
    done = program(tmp_path / "program.py", code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_script_completes_its_argument_and_tells_an_error_in_one_line(tmp_path):
    done = program(tmp_path / "program.py", PROGRAMS[0], "The captain looked at the sea")
    assert done.stdout.strip()
    assert re.fullmatch(r"\d+ tokens in \d+ bytes\n", done.stderr)
    done = program(tmp_path / "program.py", PROGRAMS[0], "")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cannot complete: the prompt is empty")


@pytest.mark.slow
def test_the_readmes_example_runs(real_home, tmp_path):
    assert len(README) == 1
    done = program(tmp_path / "program.py", README[0], KVQ_HOME=str(real_home))
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "policy adaptive" in done.stdout


USE = '''\
"""The public API as a caller with strict types uses it."""

from collections.abc import Sequence

import numpy as np

import kvq


class Threes(kvq.Policy):
    """A policy of one's own."""

    name = "threes"
    needs = frozenset({"entropy"})

    def choose(self, features: kvq.TokenFeatures) -> np.ndarray:
        return np.full((len(features.positions), 2), 8, np.uint8)


def use(model: kvq.Model, ids: Sequence[int]) -> list[str]:
    session: kvq.Session = model.session(Threes(), recent=8)
    logits: np.ndarray = session.append(ids)
    texts = [response.text for response in session.generate(None, max_tokens=3, top_k=5, seed=int(logits.argmax()))]
    stats: kvq.Stats = session.stats()
    session.trim(stats.tokens - 1)
    conversation = kvq.Conversation(model.session(), "Be brief.")
    reply: kvq.Response = next(conversation.reply("Hello", temperature=0.5))
    template: kvq.ChatTemplate = model.chat_template
    messages = [{"role": "user", "content": reply.text}]
    return [*texts, template.render(messages), *template.stop, str(template.encode(messages, False))]


def wrong(model: kvq.Model) -> None:
    model.session(recent="many")  # type: ignore[arg-type]
    list(model.session().generate("x", temperatur=1))  # type: ignore[call-arg]


try:
    print(use(kvq.load(threads=1), [1, 2, 3]))
except kvq.KvqError as error:
    raise SystemExit(str(error)) from None
'''


@pytest.mark.slow
def test_callers_code_passes_strict_type_checks(tmp_path):
    """Errors in callers' code alone: kvq is followed silently, as an installed package is."""
    package = tmp_path / "site" / "kvq"
    package.mkdir(parents=True)
    for path in [*(ROOT / "kvq").iterdir(), *(ROOT / name for name in PACKAGES)]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for number, code in enumerate([*PROGRAMS, *README, USE]):
        (tmp_path / f"program_{number}.py").write_text(code, encoding="utf-8")
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", *files],
        cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": str(tmp_path / "site"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_strict_program_runs(tmp_path):
    done = program(tmp_path / "program.py", USE)
    assert done.returncode == 0, done.stderr
