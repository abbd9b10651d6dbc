"""The command that measures drafts; no test looks at a time."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvq.bench import drafts


@pytest.mark.slow
def test_every_task_is_said_with_and_without(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--context", "60", "--tokens", "24", "--rounds", "2", "--policies", "int8,adaptive", "--json", str(file)]
    done = CliRunner().invoke(drafts.main, options)
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())
    tasks = list(drafts.EVERY)
    assert [(row["task"], row["policy"]) for row in rows] == [(t, p) for t in tasks for p in ("int8", "adaptive")]
    for row in rows:
        assert row["ratios"] == pytest.approx([a / b for a, b in zip(row["off"], row["auto"], strict=True)])
        assert 0 <= row["accepted"] <= row["drafted"]
    assert sum(row["accepted"] for row in rows if row["task"] == "edit") > 0
    assert "| edit | int8 | 60 | " in done.output


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "text").write_text("Nobody spoke.")
    done = CliRunner().invoke(drafts.main, ["--text", str(tmp_path / "text")])
    assert done.exit_code == 2
    assert "give a longer --text" in done.output


def test_answers_are_made_of_the_text():
    text = "The captain looked at the sea again. The captain said nothing to his men. They were silent as the stones."
    assert drafts.edited(text) == text.replace("captain", "zebra")
    assert drafts.quoted(text) == '1. "The captain looked at the sea again."'
    assert "The captain looked. It adds that They were silent." in drafts.summarised(text)
