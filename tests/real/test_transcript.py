"""docs/transcript.md with a model that knows something: commands that a new user types end well, and say what is so."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.tools.packages import needs
from tests.tools.transcript import REAL, TALK, program, ran

pytestmark = pytest.mark.slow


def test_the_commands_run(real_home, tmp_path):
    for package in ("llguidance", "starlette", "openai", "ollama"):
        needs(package)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    told = {}
    for command, said, code in ran(TALK, tmp_path, REAL, {"KVQ_HOME": str(real_home)}):
        assert code == 0, f"{command}: {said}"
        assert "Traceback" not in said
        assert said or command.startswith(program("", "")[:5])
        told[command] = said
    answers = [said for command, said in told.items() if "the capital of France? Answer" in command]
    assert sum("The capital of France is Paris." in said for said in answers) >= 2
    (found,) = (said for command, said in told.items() if "--schema" in command)
    assert json.loads(found) == {"city": "Paris"}
    assert '"city": "Paris"' in told["python ask.py"]
    assert told["python ask_ollama.py"] == "The capital of France is Paris."
    assert {json.loads(line)["custom_id"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()} == {
        "France", "Italy",
    }  # fmt: skip
