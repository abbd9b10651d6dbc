"""Evaluation: scores are those of decoding step by step, arms keep to equal bytes, results are complete."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

import kvq
from kvq.controller.evaluation.arms import LADDER, Bytes, oracle, shuffled, static_mix
from kvq.controller.evaluation.cli import evaluate
from kvq.controller.evaluation.divergence import outcome, reference
from kvq.controller.evaluation.pareto import ARMS, chunks, compare, measure
from kvq.controller.evaluation.report import tables
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import make_policy
from kvq.exporter.calibration import calibration_text
from kvq.exporter.export import export
from kvq.runtime.cli.main import guarded
from kvq.runtime.errors import CalibrationError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry

SPACE = Bytes(Geometry(6, 2, 64), 512, 16, sink=4)
DAMAGE = np.array([1, 0.6, 0.3, 0.1, 0.03, 0.01, 1e-3, 0])  # of a token at each step of the ladder, in proportion


@pytest.mark.parametrize("recent", [0, 3, 16])
@pytest.mark.parametrize("policy", ["fp16", "int4", "mixed", "random", "rule"])
def test_scores_agree_with_decoding_step_by_step(policy, recent, tiny_model):
    medians = []
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 512, 70)
        found = Scorer(tiny_model, recent).score(ids, make_policy(policy))
        session = tiny_model.session(policy, recent=recent)
        expected = np.stack([session.append([i]) for i in ids])
        medians.append(np.median(np.abs(found.logits - expected).max(1)))
        if policy != "rule":  # which looks at features, that may stand on a threshold
            assert found.used_nbytes == session.store.used_nbytes
            assert found.nbytes == session.store.nbytes
    # A value on the border of two codes falls either way with the last bit of a sum.
    assert np.median(medians) <= 1e-3


def test_the_16_bit_arm_has_no_divergence_and_fewer_bits_have_more(tiny_model):
    ids = np.random.default_rng(0).integers(0, 512, 80)
    scorer = Scorer(tiny_model, 4)
    expected = reference(scorer, ids)
    policies = [make_policy(name) for name in ("fp16", "int8", "int4", "int3", "int2")]
    means = [outcome(scorer, ids, expected, policy).kld.mean() for policy in policies]
    assert abs(means[0]) < 1e-6
    assert means == sorted(means)
    assert outcome(scorer, ids, expected, make_policy("fp16")).same_top1.all()


@pytest.mark.parametrize(
    ("kv_bits", "sink"), [(2.75, 0), (2.85, 4), (3.25, 4), (3.25, 0), (4.25, 4), (6.5, 1), (10, 16)], ids=str
)
def test_arms_of_given_bits_keep_the_budget_and_use_it(kv_bits, sink):
    space = Bytes(SPACE.geometry, 512, 16, sink)
    rng = np.random.default_rng(0)
    damage = np.exp(rng.standard_normal((512, 1)) * 2) * DAMAGE
    mixed = static_mix(space, kv_bits, rng)
    for bits in (mixed, oracle(space, kv_bits, damage, LADDER), shuffled(space, mixed, rng)):
        store = KVStore(space.geometry, space.recent, space.sink, protect_bits=space.protect_bits)
        kv = np.zeros((6, 2, 512, 64), np.float32)
        store.append(kv, kv, bits)
        found = space.bits(store.used_nbytes)
        assert found <= kv_bits
        assert found >= 0.97 * kv_bits


def test_the_oracle_does_less_damage_than_its_precisions_shuffled():
    rng = np.random.default_rng(0)
    damage = np.exp(rng.standard_normal((512, 1)) * 2) * DAMAGE
    bits = oracle(SPACE, 3.5, damage, LADDER)

    def total(bits):
        return sum(damage[t, LADDER.index(tuple(pair))] for t, pair in enumerate(bits.tolist()[: SPACE.stored]))

    assert total(bits) < 0.5 * total(shuffled(SPACE, bits, rng))


@pytest.mark.slow
def test_all_arms_are_measured_and_compared(tiny_model):
    texts = [np.random.default_rng(seed).integers(0, 512, 100) for seed in range(3)]
    rows = measure(tiny_model, texts, [9.0, 12.0], recent=4, arms=ARMS)
    assert {row["arm"] for row in rows} >= {"fp16", "int8", "int4", "int2", "static", "rule", "random", "oracle"}
    for row in rows:
        assert len(row["kld_by_text"]) == row["texts"] == 3
        if row["bits_requested"]:
            assert row["bits_measured"] <= row["bits_requested"]
    compared = compare(rows, "oracle")
    assert {(row["arm"], row["bits_requested"]) for row in compared} == {
        (arm, bits) for arm in ("static", "rule", "random") for bits in (9.0, 12.0)
    }
    assert all(row["low"] <= row["difference"] <= row["high"] for row in compared)


@pytest.mark.slow
def test_the_command_writes_rows(tiny_bundle, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(calibration_text())
    options = ["-m", str(tiny_bundle), "--text", str(text), "--context", "60", "--chunks", "2", "--recent", "4"]
    result = CliRunner().invoke(evaluate, ["pareto", *options, "--bits", "9", "--json", str(out)])
    assert result.exit_code == 0, result.output
    keys = {"arm", "bits_requested", "bits_measured", "context", "kld_mean", "kld_p99", "top1", "perplexity"}
    assert all(keys <= row.keys() for row in json.loads(out.read_text()))
    result = CliRunner().invoke(evaluate, ["kld", *options, "-p", "int8"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["pareto", "kld"])
def test_exact_activations_are_those_of_a_bundle_exported_so(command, tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(calibration_text())
    found = {}
    for name, activations, options in (
        ("int8", "int8", []), ("exact", "int8", ["--exact-activations"]), ("fp32", "fp32", [])
    ):  # fmt: skip
        bundle = tmp_path / activations
        if not bundle.exists():
            # Mean keys are measured with the bundle's activations, and are not what is compared here.
            export(str(tiny_checkpoint), bundle, activations=activations, center=False)
        out = tmp_path / f"{name}.json"
        options += ["-m", str(bundle), "--text", str(text), "--context", "60", "--chunks", "2", "--recent", "4"]
        options += ["--json", str(out), *(["-p", "int8"] if command == "kld" else ["--bits", "9", "--arms", "int8"])]
        result = CliRunner().invoke(evaluate, [command, *options])
        assert result.exit_code == 0, result.output
        (found[name], *_) = json.loads(out.read_text())
    assert [found[name]["activations"] for name in ("int8", "exact", "fp32")] == ["int8", "fp32", "fp32"]
    assert found["exact"]["kld_mean"] == pytest.approx(found["fp32"]["kld_mean"], rel=1e-2)
    assert found["exact"]["kld_mean"] < 0.5 * found["int8"]["kld_mean"]


def test_too_short_a_text_is_refused(tiny_bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    with pytest.raises(CalibrationError, match="a window needs") as caught:
        chunks(kvq.load(tiny_bundle), [text], 100, 2)
    assert "\n" not in str(caught.value)


def refused(arguments, capsys):
    """Exit code and stderr of ``kvq eval pareto`` with these arguments."""
    with pytest.raises(SystemExit) as caught:
        guarded(lambda: evaluate.main(["pareto", *map(str, arguments)], standalone_mode=False))
    message = capsys.readouterr().err.strip()
    assert message.startswith("kvq: ")
    assert "\n" not in message
    return caught.value.code, message


def test_refusals_are_one_line(tiny_bundle, tmp_path, capsys):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(calibration_text())
    other.write_bytes(b"\xff\xfe\x00")
    common = ["-m", tiny_bundle, "--chunks", 1, "--recent", 4]
    for extra, code, expected in (
        (["--text", text, "--context", 300], 1, "context of 256"),
        (["--text", text, "--context", 100, "--bits", "9,2"], 2, "below what is possible"),
        (["--text", text, "--context", 4, "--bits", 9], 2, "below what is possible"),
        (["--text", other, "--context", 60, "--bits", 9], 1, "not UTF-8"),
        (["--text", tmp_path / "none", "--context", 60, "--bits", 9], 1, "cannot read"),
    ):
        found, message = refused([*common, *extra], capsys)
        assert expected in message
        assert found == code


@pytest.mark.slow
def test_one_text_at_the_edges_of_the_budgets(tiny_model):
    ids = np.random.default_rng(0).integers(0, 512, 60)
    lowest = Bytes(tiny_model.session().store.geometry, 60, 4, sink=4)
    edge = lowest.bits((lowest.stored - lowest.sunk) * lowest.each(LADDER[:1])[0] + lowest.protected)
    rows = measure(tiny_model, [ids], [edge + 1e-6, 40.0], recent=4)
    for row in rows:
        assert row["bits_requested"] is None or row["bits_measured"] <= row["bits_requested"] + 1e-3
    assert tables(rows)


@pytest.mark.slow
def test_arms_measured_apart_are_those_measured_together(tiny_model):
    texts = [np.random.default_rng(seed).integers(0, 512, 60) for seed in range(2)]
    together = measure(tiny_model, texts, [9.0], recent=4)
    apart = [
        row for arms in (("int4", "random"), ("static",)) for row in measure(tiny_model, texts, [9.0], 4, arms=arms)
    ]
    assert [row["arm"] for row in apart] == ["int4", "random", "static"]
    assert all(row in together for row in apart)


@pytest.mark.parametrize("arms", ["shuffled", "adaptive,best"])
def test_arms_that_cannot_be_measured_are_wrong_usage(arms, tiny_bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(calibration_text())
    result = CliRunner().invoke(evaluate, ["pareto", "-m", str(tiny_bundle), "--text", str(text), "--arms", arms])
    assert result.exit_code == 2
    assert "--arms" in result.output


def test_a_result_that_could_not_be_written_is_refused_before_the_work(tiny_bundle, tmp_path):
    out = tmp_path / "none" / "rows.json"
    result = CliRunner().invoke(evaluate, ["pareto", "-m", str(tiny_bundle), "--text", "text", "--json", str(out)])
    assert result.exit_code == 2
    assert "there is no folder" in result.output


@pytest.mark.parametrize(
    "text",
    [
        "", "5", "[5]", '{"rows": []}', '[{"arm": "static", "factor": 1.2}]', '[{"texts": 3, "kld_mean": 0.1}]',
        '[{"arm": "int8", "cached": "many", "ms": "long"}]', '[{"arm": "int8", "cached": 5, "ms": 1, "of_first": 2}]',
        '[{"arm": "int8", "task": "sea", "acc": null, "acc_norm": 0.5, "bits": 4}]', '[{"kept": 1}]',
    ],
)  # fmt: skip
def test_a_report_of_anything_else_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    done = CliRunner().invoke(evaluate, ["report", str(tmp_path / "rows.json")])
    assert done.exit_code == 1
    assert "rows.json" in done.output
    assert done.output.count("\n") == 1
