"""docs/transcript.md: its commands are those that are run, and they end as the page says; those of kvq-books."""

from __future__ import annotations

import shutil

import pytest

from tests.tools.packages import needs
from tests.tools.transcript import BOOKS, PAGE, TALK, ran

(MISTAKES,) = (part.commands for part in BOOKS if part.title.startswith("Mistakes"))


def test_the_page_has_the_commands():
    text = PAGE.read_text("utf-8")
    assert all(f"\n$ {command}\n" in text for part in (*BOOKS, *TALK) for command in part.commands)


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    needs("llguidance"), needs("starlette")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for command, said, code in ran(BOOKS, tmp_path, "kvq-books", {}):
        assert code in (1, 2) if command in MISTAKES else code == 0, f"{command}: {said}"
        assert said
        assert "Traceback" not in said
        if command in MISTAKES:
            assert said.count("\n") == 0
        if "--context-shift" in command:
            assert "context full once" in said
    assert (tmp_path / "story.txt").stat().st_size > 2000
