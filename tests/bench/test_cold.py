"""The command that measures cold starts; no test looks at a time."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvq.bench import cold


@pytest.mark.slow
def test_every_arm_comes_to_its_first_token(cache, tmp_path):
    file = tmp_path / "rows.json"
    options = ["--shape", "tiny", "--prompt", "24,40", "--arms", "kvq-fp16,ort-gqa-fp32", "--rounds", "2"]
    done = CliRunner().invoke(cold.main, [*options, "--threads", "1", "--cache", str(cache), "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())
    arms = [("kvq-fp16", 24), ("ort-gqa-fp32", 24), ("kvq-fp16", 40), ("ort-gqa-fp32", 40)]
    assert [(row["arm"], row["context"]) for row in rows] == arms
    for row in rows:
        assert len(row["first_s"]) == 2
        assert all(0 < loaded < first for loaded, first in zip(row["loaded_s"], row["first_s"], strict=True))
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratios"] == [1, 1]
        assert theirs["ratios"] == pytest.approx(
            [t / o for t, o in zip(theirs["first_s"], ours["first_s"], strict=True)]
        )


def test_an_arm_that_cannot_run_is_named(cache, monkeypatch):
    monkeypatch.setattr(cold, "begin", lambda run, arm, ids: (_ for _ in ()).throw(cold.ChildError("it fell over")))
    done = CliRunner().invoke(
        cold.main, ["--shape", "tiny", "--prompt", "8", "--arms", "kvq-fp16", "--cache", str(cache)]
    )
    assert done.exit_code == 1
    assert "kvq-fp16: skipped, it fell over" in done.output
