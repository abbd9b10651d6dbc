"""The decode benchmark: what it measures is right and complete. No test looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import kvq
from kvq.bench import decode, report, schedule
from kvq.bench.arms import ARMS, ArmSpec
from kvq.bench.arms.kvq_arms import KvqArm
from kvq.bench.check import check_ids, relative_difference
from kvq.bench.controllers import add_controllers
from kvq.bench.floor import read_bandwidth
from kvq.bench.shapes import BENCH_SHAPES, assets, make_bundle
from kvq.bench.weights import BundleWeights
from kvq.runtime.bundle.manifest import MANIFEST

KEYS = {"arm", "shape", "context", "threads", "ms_per_token", "prefill_tokens_per_s", "kv_bytes", "peak_rss_bytes"}
MEASURED = ("kvq-fp16", "kvq-mixed", "kvq-adaptive", "kvq-rule", "ort-gqa-fp32", "ort-gqa-int8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Folder of the tiny shape's files, made once."""
    folder = tmp_path_factory.mktemp("bench")
    make_bundle(assets("tiny", folder))
    return folder


@pytest.fixture(scope="module")
def measured(cache, tmp_path_factory):
    """A finished run over the tiny shape: exit code, stdout, stderr, and the JSON file."""
    file = tmp_path_factory.mktemp("rows") / "tiny.json"
    command = [sys.executable, "-m", "kvq.bench.decode", "--shape", "tiny", "--context", "24,48", "--threads", "1"]
    command += ["--arms", ",".join(MEASURED), "--rounds", "2", "--steps", "3", "--prefills", "3"]
    command += ["--cache", str(cache), "--json", str(file), "--plot", str(file.with_suffix(".png"))]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr, file


def rows_of(measured):
    code, _, err, file = measured
    assert code == 0, err
    return json.loads(file.read_text())


def refused(*arguments):
    """The one line that decode says to wrong options."""
    result = CliRunner().invoke(decode.main, list(arguments))
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    return result.output


def plan(cache, *arms):
    return schedule.Plan("tiny", list(arms), [24], 1, cache, steps=2, rounds=1)


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


def test_cache_bytes_are_those_of_the_cache(measured, cache):
    values = assets("tiny", cache).values_per_token
    by_arm = {row["arm"]: row for row in rows_of(measured) if row["context"] == 48}
    room = 48 + 9  # context and all decode steps
    assert by_arm["ort-gqa-fp32"]["kv_bytes"] == 4 * values * room
    assert by_arm["ort-gqa-int8"]["kv_bytes"] == values * room
    assert by_arm["kvq-mixed"]["kv_bytes"] < by_arm["kvq-fp16"]["kv_bytes"]


def test_arms_agree_and_say_with_what(measured):
    for row in rows_of(measured):
        assert row["check_difference"] <= (row["check_tolerance"] or 0.5)
    by_arm = {row["arm"]: row for row in rows_of(measured)}
    assert by_arm["ort-gqa-fp32"]["check_reference"] == "kvq-fp16 on numpy, float32 activations"
    assert by_arm["ort-gqa-fp32"]["check_tolerance"] == 0.01
    assert by_arm["kvq-mixed"]["check_reference"] == "kvq-mixed on numpy, float32 activations"


def test_rows_of_policies_that_look_at_tokens_say_what_that_takes(measured):
    for row in rows_of(measured):
        assert ("policy_ms" in row) == (row["arm"] in ("kvq-adaptive", "kvq-rule"))
        if "policy_ms" in row:
            assert 0 < row["policy_ms"] < 1e3
            assert 0 < row["policy_prefill_share"] < 1
            assert sum(row["tokens_by_precision"].values()) == row["context"] + 9
            assert "3.25 bits a value in all" in row["settings"]


def test_controllers_of_the_benchmark_are_added_once_and_mix_classes(measured, cache):
    bundle = assets("tiny", cache).bundle
    before = (bundle / MANIFEST).read_bytes()
    add_controllers(bundle, 1)
    assert (bundle / MANIFEST).read_bytes() == before
    model = kvq.load(bundle)
    ids = np.random.default_rng(4).integers(0, 512, 600)
    for name in ("adaptive", "paper"):
        session = model.session(name, kv_bits=4.5)
        session.append(ids)
        held = [row["tokens"] for pair, row in session.stats().precisions.items() if pair != "recent"]
        assert sum(tokens > 30 for tokens in held) >= 2


def test_table_goes_to_stdout_and_progress_to_stderr(measured):
    _, out, err, file = measured
    assert "ms/token" in out
    assert "kvq-mixed" in out
    assert "round" not in out
    assert "round 2 of 2" in err
    assert file.with_suffix(".png").stat().st_size > 1000


def test_report_renders(measured, tmp_path):
    rows_of(measured)
    out = tmp_path / "performance.md"
    result = CliRunner().invoke(report.main, [str(measured[3]), "-o", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert "### 48 cached tokens" in text
    assert "| kvq-mixed |" in text
    assert "controller of the real size with untrained weights" in text
    assert "![ms per token against cached tokens](tiny.png)" in text
    assert (tmp_path / "tiny.png").is_file()


def test_report_compares_with_the_fastest_arm_of_each_peer():
    arms = {"kvq-int4": 2.0, "ort-gqa-fp32": 8.0, "ort-gqa-int8": 5.0, "llama-f16": 7.0}
    rest = dict.fromkeys(
        ("ms_p25", "ms_p75", "floor_ms", "over_floor", "gb_per_s", "prefill_tokens_per_s", "kv_bytes",
         "peak_rss_bytes", "check_difference"), 1.0,
    )  # fmt: skip
    rows = [{"arm": arm, "ms_per_token": ms, **rest} for arm, ms in arms.items()]
    assert report.table(rows)[2].startswith("| kvq-int4 | 2.00 | 1.00 - 1.00 | 2.50 | 3.50 |")
    for row in rows:  # the machine is half as fast in the second and third turn, and one arm slower still in the third
        ms = row["ms_per_token"]
        row["burst_ms"] = [ms, 2 * ms, (3 if row["arm"] == "llama-f16" else 2) * ms]
    assert report.table(rows)[2].startswith(
        "| kvq-int4 | 2.00 | 1.00 - 1.00 | 2.50 (2.50 - 2.50) | 3.50 (3.50 - 4.38) |"
    )


def test_report_compares_prefill_turn_by_turn():
    # The machine is half as fast in the second and third turn: each arm's median says little, its ratios all.
    seconds = {"kvq-int4": [1, 2, 2], "ort-gqa-fp32": [2, 4, 6], "ort-gqa-int8": [9, 9, 9], "llama-f16": [1, 2, 4]}
    rows = [
        {"arm": arm, "context": 12, "prefill_seconds": taken, "prefill_tokens_per_s": 12 / sorted(taken)[1]}
        for arm, taken in seconds.items()
    ]
    lines = report.prefill_table(rows)
    assert lines[2] == "| kvq-int4 | 6 (6 - 9) | 2.00 (2.00 - 2.50) | 1.00 (1.00 - 1.50) | 3 |"
    assert [line.split(" |")[0] for line in lines[3:]] == ["| llama-f16", "| ort-gqa-fp32", "| ort-gqa-int8"]
    for row in rows:
        del row["prefill_seconds"]  # as in files of before turns were kept
    assert report.prefill_table(rows)[2] == "| kvq-int4 | 6 | 2.00 | 1.00 | - |"


def test_arms_take_every_place_in_turn():
    arms = ["a", "b", "c"]
    orders = [schedule.rotated(arms, turn) for turn in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert schedule.rotated([], 3) == []


def test_report_refuses_other_files_in_one_line(tmp_path):
    file = tmp_path / "x.json"
    for content in ("{", "[]", '{"a": 1}', '[{"arm": "kvq-fp16"}]', '[{"run": {}}]'):
        file.write_text(content)
        result = CliRunner().invoke(report.main, [str(file), "-o", str(tmp_path / "out.md")])
        assert result.exit_code == 2, content
        assert len(result.output.strip().splitlines()) == 1


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


def test_an_arm_that_is_not_installed_is_named_as_skipped(cache, monkeypatch):
    class Absent(KvqArm):
        packages = ("no_such_runtime",)

    monkeypatch.setitem(ARMS, "absent", ArmSpec(Absent, {"policy": "fp16"}))
    said: list[str] = []
    run = schedule.Run(plan(cache, "absent"), said.append)
    run.prepare()
    assert run.result.skipped == {"absent": "not installed: no_such_runtime"}
    assert said == ["absent: skipped, not installed: no_such_runtime"]


def test_an_arm_whose_process_dies_is_named_as_skipped(cache, monkeypatch):
    monkeypatch.setitem(ARMS, "broken", ArmSpec(KvqArm, {"policy": "fp16"}))  # the child does not know it
    run = schedule.Run(plan(cache, "broken"), lambda line: None)
    run.prepare()
    assert "KeyError" in run.result.skipped["broken"]
    assert not run.result.wrong


@pytest.mark.parametrize("error", [0.02, np.nan])
def test_a_wrong_backend_is_caught_before_it_is_timed(cache, monkeypatch, error):
    real = schedule.Run._logits

    def wrong(self, arm, backend, exact):
        logits = real(self, "kvq-fp16", "numpy", exact)
        return logits if backend == "numpy" else logits + error * np.roll(logits, 1, axis=1)

    monkeypatch.setattr(schedule.Run, "_logits", wrong)
    run = schedule.Run(plan(cache, "kvq-fp16"), lambda line: None)
    run.prepare()
    assert run.result.wrong == ["kvq-fp16"]
    assert "a speed would mean nothing" in run.result.skipped["kvq-fp16"]
    run.measure(24)
    assert run.result.rows == []


def test_a_wrong_arm_makes_the_exit_code_1(monkeypatch, tmp_path):
    def prepare(self):
        self.result.skipped["kvq-fp16"] = "wrong"
        self.result.wrong.append("kvq-fp16")

    monkeypatch.setattr(schedule.Run, "prepare", prepare)
    arguments = ["--shape", "tiny", "--arms", "kvq-fp16", "--context", "24", "--cache", str(tmp_path)]
    result = CliRunner().invoke(decode.main, arguments)
    assert result.exit_code == 1
    assert "kvq-fp16: skipped, wrong" in result.output


def test_groups_fit_into_memory_and_share_their_first_arm(cache, monkeypatch):
    run = schedule.Run(plan(cache, "kvq-fp16", "kvq-int4", "ort-gqa-fp32", "llama-f16"), lambda line: None)
    need = ARMS["kvq-fp16"].resident_bytes(run.plan.assets, 24)
    monkeypatch.setattr(schedule, "available_bytes", lambda: int(2.1 * need / schedule.SHARE_OF_MEMORY))
    assert run._groups(24) == [["kvq-fp16", "kvq-int4"], ["kvq-fp16", "ort-gqa-fp32"], ["kvq-fp16", "llama-f16"]]
    monkeypatch.setattr(schedule, "available_bytes", lambda: 1 << 50)
    assert run._groups(24) == [["kvq-fp16", "kvq-int4", "ort-gqa-fp32", "llama-f16"]]


def test_checkpoint_holds_the_values_of_the_bundle(cache):
    from safetensors.numpy import load_file

    made = assets("tiny", cache)
    stored = load_file(made.checkpoint / "model.safetensors")
    weights = BundleWeights(made)
    expected = weights.vectors() | {name: matrix.dequantize() for name, matrix in weights.parts()}
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor)


def test_gguf_blocks_decode_to_the_values_of_the_bundle(cache):
    gguf = pytest.importorskip("gguf")
    from kvq.bench.gguf_file import _blocks

    for _, matrix in BundleWeights(assets("tiny", cache)).parts():
        kind, blocks = _blocks(matrix)
        decoded = gguf.quants.dequantize(blocks, kind)
        np.testing.assert_allclose(decoded, matrix.dequantize(), rtol=2**-10, atol=1e-7)  # scales in half precision


def test_relative_difference():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9, 4096)).astype(np.float32)
    assert relative_difference(a, a) == 0
    assert relative_difference(a, a + 5) == pytest.approx(5, rel=0.05)
    assert relative_difference(a, b) == pytest.approx(2**0.5, rel=0.05)
    assert relative_difference(a[:1], b) == float("inf")
    assert relative_difference(np.full_like(a, np.nan), a) == float("inf")


def test_check_tokens_are_the_same_every_time():
    for first, second in zip(check_ids(512), check_ids(512), strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.max() < 512


def test_bandwidth_is_bytes_per_second():
    assert 1e8 < read_bandwidth(1, nbytes=1 << 24, repeats=2) < 1e13


def test_every_arm_has_a_name_for_its_family():
    assert {name.split("-")[0] for name in ARMS} >= {"kvq", "ort", "transformers", "llama", "genai", "openvino"}
    assert next(iter(ARMS)).startswith("kvq-")


def test_nothing_of_the_benchmark_imports_torch_or_a_peer_at_start():
    code = "import sys, kvq.bench.decode; print(sorted({'torch', 'onnx', 'llama_cpp', 'openvino'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr
