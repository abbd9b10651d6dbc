"""Commands that measure kvq alone, and two checkouts side by side. No test looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvq.bench import compare, memory
from kvq.bench.kvq.arms import PolicyTimer
from kvq.bench.process import Child, ChildError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_checkouts_are_compared_turn_by_turn(tiny_bundle, tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "kvq.bench.compare", ROOT, ROOT, "--model", tiny_bundle, "--rounds", "2"]
    command += ["--context", "24,4000", "--steps", "3", "--threads", "1", "--json", file]
    command += ["--policies", "int4,adaptive,fp16"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adaptive: skipped, " in done.stderr
    rows = json.loads(file.read_text())
    longest = 256 - 3  # the context and room for the steps
    cells = [(row["measure"], row["policy"], row["tokens"]) for row in rows]
    starts = [("first token, ms", None, None), ("import, ms", None, None)]
    each = [(p, tokens) for tokens in (24, longest) for p in ("int4", "fp16")]
    assert cells == starts + [(m, *about) for about in each for m in ("prefill, tokens/s", "decode, ms/token")]
    for row in rows:
        assert len(row["a"]) == len(row["b"]) == len(row["ratios"]) == 2
        assert row["ratios"] == pytest.approx([b / a for a, b in zip(row["a"], row["b"], strict=True)])
        assert row["ratio_p25"] <= row["ratio_median"] <= row["ratio_p75"]
        assert row["run"]["A"] == str(ROOT)
    assert f"| decode, ms/token | int4 | {longest} | " in done.stdout


@pytest.mark.slow
def test_a_folder_that_is_no_checkout_is_refused(tiny_bundle, tmp_path):
    (tmp_path / "kvq").mkdir()
    result = CliRunner().invoke(compare.main, [str(ROOT), str(tmp_path), "--model", str(tiny_bundle), "--threads", "1"])
    assert result.exit_code == 2
    assert f"B: {tmp_path} is not a checkout of kvq" in result.output


def test_attention_that_is_not_computed_alike_is_refused():
    about = {side: {"file": f"/{side}/kvq/__init__.py", "backend": side} for side in "ab"}
    with pytest.raises(compare.Refused, match="build the native library in both"):
        compare.check({side: Path(f"/{side}") for side in "ab"}, about)


def test_memory_is_split_without_rest(tiny_bundle, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--model", str(tiny_bundle), "--context", "64", "--policy", "int4", "--json", str(file)]
    result = CliRunner().invoke(memory.main, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(file.read_text())
    assert row["peak_rss_bytes"] == row["loaded_bytes"] + row["kv_bytes"] + row["other_bytes"]
    assert result.output.splitlines()[2].startswith("| int4 | 64 | ")


@pytest.mark.slow
def test_what_fails_in_a_process_is_one_line(tiny_bundle):
    arguments = ["--model", str(tiny_bundle), "--policy", "int5", "--context", "64"]
    result = CliRunner().invoke(memory.main, arguments)
    assert result.exit_code == 1
    assert "Error: measure failed: PolicyError: unknown policy 'int5'" in result.output
    with Child("os:getcwd", {}) as child, pytest.raises(ChildError, match="AttributeError"):
        child.ask("nothing")
    with Child("sys:exit", {}) as child, pytest.raises(ChildError, match="ended with code 0"):
        child.ask("nothing")


def test_what_choosing_takes_is_a_part_of_a_step(tiny_model):
    session = tiny_model.session("rule", kv_bits=9)
    session.timer = timer = PolicyTimer()
    session.append([1, 2, 3])
    before = timer.seconds
    session.append([4])
    assert 0 < before < timer.seconds
