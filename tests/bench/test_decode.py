"""The decode benchmark: what it measures is right and complete. No test looks at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

import kvq
from kvq.bench import decode, schedule
from kvq.bench.arm import arms
from kvq.bench.kvq.arms import KvqArm
from kvq.bench.shapes import BENCH_SHAPES, assets
from tests.bench.conftest import MEASURED
from tests.tools.families import SMALL, save_family
from tests.tools.gguf_files import write_gguf

KEYS = {"arm", "shape", "context", "threads", "ms_per_token", "prefill_tokens_per_s", "kv_bytes", "peak_rss_bytes"}


def rows_of(measured):
    return json.loads(measured[2].read_text())


def refused(*arguments):
    """The one line that decode says to wrong options."""
    result = CliRunner().invoke(decode.main, list(arguments))
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    return result.output


def run(cache, *names):
    return schedule.Run("tiny", list(names), [24], 1, cache, steps=2, rounds=1, say=lambda line: None)


@pytest.mark.slow
def test_rows_have_the_promised_keys_and_consistent_units(measured):
    rows = rows_of(measured)
    assert {(row["arm"], row["context"]) for row in rows} == {
        (arm, context) for arm in MEASURED for context in (24, 48)
    }
    for row in rows:
        assert row.keys() >= KEYS
        assert row["shape"] == "tiny"
        assert row["threads"] == 1
        assert len(row["prefill_seconds"]) == 3
        assert row["prefill_tokens_per_s"] == pytest.approx(row["context"] / sorted(row["prefill_seconds"])[1])
        assert row["steps"] == 4  # two rounds of three, the first of each not counted
        assert len(row["burst_ms"]) == 2
        assert min(row["burst_ms"]) <= row["ms_per_token"] <= max(row["burst_ms"])
        assert row["ms_p25"] <= row["ms_per_token"] <= row["ms_p75"]
        read = row["weight_bytes"] + row["cache_read_bytes"]
        assert row["gb_per_s"] == pytest.approx(read / (row["ms_per_token"] / 1e3) / 1e9)
        assert row["floor_ms"] == pytest.approx(read / (row["bandwidth_gb_per_s"] * 1e9) * 1e3)
        assert row["over_floor"] == pytest.approx(row["ms_per_token"] / row["floor_ms"])
        assert row["peak_rss_bytes"] > 20e6  # a Python process: bytes, not kilobytes
        assert row["run"]["skipped"] == {}


@pytest.mark.slow
def test_cache_bytes_are_those_of_the_cache(measured, cache):
    values = assets("tiny", cache).values_per_token
    by_arm = {row["arm"]: row for row in rows_of(measured) if row["context"] == 48}
    room = 48 + 9  # context and all decode steps
    assert by_arm["ort-gqa-fp32"]["kv_bytes"] == 4 * values * room
    assert by_arm["ort-gqa-int8"]["kv_bytes"] == values * room
    assert by_arm["kvq-mixed"]["kv_bytes"] < by_arm["kvq-fp16"]["kv_bytes"]


@pytest.mark.slow
def test_arms_agree_and_say_with_what(measured):
    for row in rows_of(measured):
        assert row["check_difference"] <= (row["check_tolerance"] or 0.5)
    by_arm = {row["arm"]: row for row in rows_of(measured)}
    assert by_arm["ort-gqa-fp32"]["check_reference"] == "kvq-fp16 on numpy, float32 activations"
    assert by_arm["ort-gqa-fp32"]["check_tolerance"] == 0.01
    assert by_arm["kvq-mixed"]["check_reference"] == "kvq-mixed on numpy, float32 activations"


@pytest.mark.slow
def test_rows_of_policies_that_look_at_tokens_say_what_that_takes(measured):
    for row in rows_of(measured):
        assert ("policy_ms" in row) == (row["arm"] in ("kvq-adaptive", "kvq-rule"))
        if "policy_ms" in row:
            assert 0 < row["policy_ms"] < 1e3
            assert 0 < row["policy_prefill_share"] < 1
            assert sum(row["tokens_by_precision"].values()) == row["context"] + 9
            assert "3.25 bits a value in all" in row["settings"]


@pytest.mark.slow
def test_table_goes_to_stdout_and_progress_to_stderr(measured):
    out, err, file = measured
    assert "ms/token" in out
    assert "kvq-mixed" in out
    assert "round" not in out
    assert "round 2 of 2" in err
    assert file.with_suffix(".png").stat().st_size > 1000


def test_arms_take_every_place_in_turn(monkeypatch):
    monkeypatch.setattr(schedule, "PAUSE", 0)
    orders = ["".join(schedule.in_turn("abc", turn)) for turn in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert "".join(schedule.in_turn("abc", 1, out={"c"})) == "ba"
    assert list(schedule.in_turn([], 3)) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "kvq-int3"], ["unknown arm 'kvq-int3'", "kvq-int4"]),
        (["--arms", ","], ["no arm given"]),
        (["--shape", "smollm-1b"], ["unknown shape 'smollm-1b'", *BENCH_SHAPES]),
        (["--prefills", "0"], ["prefills", "at least 1"]),
        (["--context", "0"], ["context '0'", "8192"]),
        (["--context", "512,many"], ["context 'many'"]),
        (["--context", "9000"], ["context '9000'"]),
        (["--backend", "fortran"], ["unknown backend 'fortran'", "numpy"]),
        (["--threads", "0"], ["threads must be from 1"]),
        (["--steps", "100", "--rounds", "100"], ["steps * (rounds + 1)"]),
        (["--json", "no/such/folder/x.json"], ["not a folder"]),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(arguments, words):
    line = refused(*arguments)
    for word in words:
        assert word in line


@pytest.mark.slow
def test_an_arm_that_is_not_installed_is_named_as_skipped(cache, monkeypatch):
    class Absent(KvqArm):
        packages = ("no_such_runtime", "no_such.runtime", "numpy")

    monkeypatch.setitem(arms(), "absent", Absent("fp16"))
    said: list[str] = []
    bench = run(cache, "absent")
    bench.say = said.append
    bench.prepare()
    assert bench.skipped == {"absent": "not installed: no_such_runtime, no_such.runtime"}
    assert said == ["absent: skipped, not installed: no_such_runtime, no_such.runtime"]


@pytest.mark.slow
def test_an_arm_whose_process_dies_is_named_as_skipped(cache, monkeypatch):
    monkeypatch.setitem(arms(), "broken", KvqArm("fp16"))  # the child does not know it
    bench = run(cache, "broken")
    bench.prepare()
    assert "KeyError" in bench.skipped["broken"]
    assert not bench.wrong


@pytest.mark.parametrize("error", [0.02, np.nan])
@pytest.mark.slow
def test_a_wrong_backend_is_caught_before_it_is_timed(cache, monkeypatch, error):
    real = schedule.Run._logits

    def wrong(self, arm, backend, exact):
        logits = real(self, "kvq-fp16", "numpy", exact)
        return logits if backend == "numpy" else logits + error * np.roll(logits, 1, axis=1)

    monkeypatch.setattr(schedule.Run, "_logits", wrong)
    bench = run(cache, "kvq-fp16")
    bench.prepare()
    assert bench.wrong == ["kvq-fp16"]
    assert "a speed would mean nothing" in bench.skipped["kvq-fp16"]
    bench.measure(24)
    assert bench.rows == []


def test_a_wrong_arm_makes_the_exit_code_1(monkeypatch, tmp_path):
    def prepare(self):
        self.skipped["kvq-fp16"] = "wrong"
        self.wrong.append("kvq-fp16")

    monkeypatch.setattr(schedule.Run, "prepare", prepare)
    arguments = ["--shape", "tiny", "--arms", "kvq-fp16", "--context", "24", "--cache", str(tmp_path)]
    result = CliRunner().invoke(decode.main, arguments)
    assert result.exit_code == 1
    assert "kvq-fp16: skipped, wrong" in result.output


@pytest.mark.slow
def test_groups_fit_into_memory_and_share_their_first_arm(cache, monkeypatch):
    bench = run(cache, "kvq-fp16", "kvq-int4", "ort-gqa-fp32", "llama-f16")
    need = arms()["kvq-fp16"].resident_bytes(bench.assets, 24)
    monkeypatch.setattr(schedule, "available_bytes", lambda: int(2.1 * need / schedule.SHARE_OF_MEMORY))
    assert bench._groups(24) == [["kvq-fp16", "kvq-int4"], ["kvq-fp16", "ort-gqa-fp32"], ["kvq-fp16", "llama-f16"]]
    monkeypatch.setattr(schedule, "available_bytes", lambda: 1 << 50)
    assert bench._groups(24) == [["kvq-fp16", "kvq-int4", "ort-gqa-fp32", "llama-f16"]]


@pytest.mark.slow
def test_a_gguf_file_is_measured_by_those_who_take_it(tmp_path):
    fields = SMALL["qwen3"] | {"intermediate_size": 128, "max_position_embeddings": 1024}
    file = write_gguf(tmp_path / "small.gguf", save_family(tmp_path / "folder", fields), "Q8_0")
    options = ["--shape", str(file), "--threads", "1", "--cache", str(tmp_path / "cache")]
    few = ["--arms", "kvq-fp16,ort-gqa-fp32", "--context", "24", "--rounds", "1", "--steps", "2", "--prefills", "1"]
    done = CliRunner().invoke(decode.main, [*options, *few, "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    assert "ort-gqa-fp32: skipped, it takes the shapes, not a file" in done.output
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["arm"], row["shape"], row["check_tolerance"]) == ("kvq-fp16", "small.gguf", 0.01)
    model = kvq.load(next((tmp_path / "cache").iterdir()) / "bundle")
    assert model.bundle.manifest.source["format"] == "gguf"
    values = 2 * 3 * 2 * 128  # layers, heads, head_dim: heads of a size of their own
    assert assets(str(file), tmp_path).values_per_token == values
    assert row["kv_bytes"] >= 2 * values * 24
    assert refused(*options, "--context", "8192").endswith("768 cached tokens and 256 steps; leave out 8192\n")
    assert "nowhere.gguf (No such file or directory); check the path" in refused("--shape", "nowhere.gguf")
