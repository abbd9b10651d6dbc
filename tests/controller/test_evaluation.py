"""Evaluation: scores are those of decoding step by step, arms keep to equal bytes, results are complete."""

from __future__ import annotations

import json

import click
import numpy as np
import pytest
from click.testing import CliRunner

import kvq
from kvq.controller.evaluation import paired
from kvq.controller.evaluation.arms import LADDER, Bytes, oracle, shuffled, static_mix
from kvq.controller.evaluation.cli import evaluate
from kvq.controller.evaluation.cli.options import arms_of, bar, protected
from kvq.controller.evaluation.divergence import outcome, reference
from kvq.controller.evaluation.kld import EDGES
from kvq.controller.evaluation.pareto import ARMS, chunks, compare, measure
from kvq.controller.evaluation.report import kld_table, tables, task_table
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import make_policy
from kvq.exporter.calibration import calibration_text
from kvq.exporter.export import export
from kvq.runtime.cli.main import guarded
from kvq.runtime.errors import CalibrationError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import Geometry
from tests.tools.tree import DOCS

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


def test_divergence_has_a_table_of_whole_texts_and_of_positions(tiny_bundle, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(calibration_text())
    command = ["kld", "-m", str(tiny_bundle), "--text", str(text), "--context", "70,40", "--chunks", "2"]
    done = CliRunner().invoke(evaluate, [*command, "-p", "int8", "-p", "rule", "--kv-bits", "9", "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [row["positions"] for row in rows if row["context"] == 70] == [[0, 70], [0, 64], [64, 70]] * 2
    short, long = done.stdout.split("### Context 70")
    assert short.startswith("### Context 40, 2 texts")
    assert "by position" not in short  # which are all in one part
    assert "| arm | 0 to 63 | 64 to 69 |" in long
    for row in rows:
        part = short if row["context"] == 40 else long
        arm = row["policy"] + (" at 9" if "kv_bits" in row else "")
        (line, *placed) = [line for line in part.splitlines() if line.startswith(f"| {arm} | ")]
        assert len(placed) == (row["context"] == 70)
        if row["positions"] == [0, row["context"]]:
            figures = f"{row['kld_mean']:.5f} | {row['kld_p99']:.4f} | {row['top1']:.2%} | {row['perplexity']:.3f} |"
            assert line == f"| {arm} | {row['bits']:.2f} | {figures}"
        else:
            assert f"{row['kld_mean']:.5f}" in placed[0]
    again = CliRunner().invoke(evaluate, ["report", str(out)])
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout


def test_the_committed_divergences_have_a_table():
    rows = json.loads((DOCS / "quality" / "smollm2-kld.json").read_text())
    table = kld_table(rows)
    assert len(table.splitlines()) > len({row["policy"] for row in rows}) > 0
    assert f"{EDGES[1]} to {EDGES[2] - 1}" in table


@pytest.mark.parametrize(
    ("policy", "kv_bits", "unasked"),
    [("fp16", None, 16), ("int8", None, 16), ("k8v4", None, 16), ("int4", None, 8), ("k4v2", None, 8),
     ("rule", None, 8), ("rule", 9.0, 8), ("mixed", None, 8)],
)  # fmt: skip
def test_what_is_protected_has_the_bits_that_were_asked_for(policy, kv_bits, unasked, tiny_model, monkeypatch):
    made = []
    session = type(tiny_model).session

    def noted(self, *arguments, **options):
        made.append(session(self, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(type(tiny_model), "session", noted)
    for asked in (None, 8, 16):
        Scorer(tiny_model, recent=4, protect_bits=asked).score(np.arange(9), make_policy(policy), kv_bits)
    eight = 16 if policy == "fp16" else 8  # that of the exact arm stays exact
    assert [each.store.protect_bits for each in made] == [unasked, eight, 16]


@pytest.mark.parametrize(("asked", "bits"), [(None, [16, 16, 8]), (8, [16, 8, 8]), (16, [16, 16, 16])])
def test_the_exact_arm_stays_so_whatever_is_protected_in_others(asked, bits, tiny_model):
    arms = arms_of(tiny_model, ["fp16", "int8", "int4"], [], protected(4, 2, asked))
    assert [tiny_model.session(policy, **given).store.protect_bits for policy, given in arms] == bits


@pytest.mark.parametrize("command", ["pareto", "kld"])
def test_bits_of_protected_tokens_reach_the_arms_of_a_command(command, tiny_bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(calibration_text())
    arms = ["-p", "int8"] if command == "kld" else ["--bits", "12", "--arms", "int8"]
    common = [command, "-m", str(tiny_bundle), "--text", str(text), "--context", "40", "--chunks", "1", *arms]
    found = []
    for asked in ([], ["--protect-bits", "16"], ["--protect-bits", "8"]):
        out = tmp_path / "rows.json"
        done = CliRunner().invoke(evaluate, [*common, *asked, "--json", str(out)])
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text())[0]["bits" if command == "kld" else "bits_mean"])
    assert found[0] == found[1] > found[2]


def test_help_says_what_protected_tokens_get():
    texts = {
        name: " ".join(CliRunner().invoke(evaluate, [name, "--help"]).output.split())
        for name in ("pareto", "kld", "needle", "tasks", "paper-table")
    }
    for name, text in texts.items():
        assert "Of protected tokens; if not given 16 with policies of 8 bits and more" in text
        assert ("8 with any budget" in text) == (name in ("pareto", "kld"))
    assert "at 8 or 16 bits in every arm" in texts["tasks"]
    assert "kvq eval report writes too" in texts["kld"]


def compared(texts):
    """Rows of two arms, of which one is as much better on every text."""
    shared = {"bits_requested": 3.25, "bits_mean": 3.2, "bits_with_slack": 3.3, "context": 64, "texts": texts}
    shared |= {"kld_p99": 0.5, "top1": 0.9, "perplexity": 9.0}
    return [
        shared | {"arm": arm, "kld_mean": kld, "kld_by_text": [kld] * texts}
        for arm, kld in (("static", 0.2), ("adaptive", 0.1))
    ]


def test_too_few_texts_have_no_interval():
    few, enough = tables(compared(paired.FEWEST - 1)), tables(compared(paired.FEWEST))
    assert "| +0.10000 | none: n = 5, fewer than 6 texts | 2.00 |" in few
    assert "| +0.10000 | +0.10000 to +0.10000 | 2.00 |" in enough


def asked_row(arm, items, **more):
    return {"task": "sea", "arm": arm, "items": items, "acc": 0.5, "acc_norm": 0.25, "bits": 4.0} | more


def test_a_table_of_tasks_says_what_its_cells_are():
    beside = {"acc_difference": {"mean": 0, "low": -0.1, "high": 0.1}}
    asked = [asked_row("fp16", 6), asked_row("int4", 6, **beside)]
    timed = [
        {"arm": "fp16", "cached": 512, "ms": 2.0, "bits": 16},
        {"arm": "int4", "cached": 512, "ms": 1.0, "bits": 4, "of_first": {"median": 0.6, "low": 0.5, "high": 0.7}},
    ]
    both, tasks, times = (task_table(rows) for rows in (asked + timed, asked, timed))
    assert "| int4 | 50.0 / 25.0 (-10.0 to +10.0), 4.0 | 1.0, 0.60 (0.50 to 0.70) |" in both
    for words, without in (("acc / acc_norm in %", times), ("first arm in the same round", tasks)):
        assert both.count(words) == 1
        assert words not in without
    assert "n:" not in both
    few = task_table([asked_row("fp16", 5), asked_row("int4", 5, **beside)])
    assert "| int4 | 50.0 / 25.0 (n = 5), 4.0 |" in few
    assert "n: so few items have no interval; it takes 6." in few


@pytest.mark.parametrize(("bits", "said"), [(3.5, False), (7.0, True)])
def test_bits_beyond_a_budget_are_explained(bits, said):
    arm = {"kv_bits": 3.25, "bits": bits}
    timed = {"arm": "rule", "cached": 512, "ms": 2.0}
    for rows in ([asked_row("fp16", 9, bits=16), asked_row("rule", 9, **arm)], [timed | arm]):
        assert ("docs/guide.md#policies-and-budgets" in task_table(rows)) == said


def test_a_report_of_several_commands_keeps_their_tables_apart(tmp_path):
    files = [tmp_path / "tasks.json", tmp_path / "kld.json"]
    files[0].write_text(json.dumps([asked_row("fp16", 9)]))
    files[1].write_text((DOCS / "quality" / "smollm2-kld.json").read_text())
    done = CliRunner().invoke(evaluate, ["report", *map(str, files)])
    assert done.exit_code == 0, done.output
    blocks = done.stdout.split("\n\n")
    assert all(len({line.startswith("|") for line in block.strip().splitlines()}) == 1 for block in blocks)


def test_progress_is_told_before_each_arm_of_each_text(tiny_model):
    told = []
    texts = [np.random.default_rng(seed).integers(0, 512, 30) for seed in range(2)]
    arms = ("int8", "int4", "static", "rule")
    measure(tiny_model, texts, [9.0, 12.0], 4, arms=arms, progress=lambda *call: told.append(call))
    shares = [done / total for done, total, _ in told]
    # Of each text the exact arm, two fixed ones, and two more for each budget.
    assert shares == pytest.approx([step / 14 for step in range(15)])
    assert [what for *_, what in told[:8]] == ["context 30, text 1 of 2"] * 7 + ["context 30, text 2 of 2"]


def test_a_bar_begins_again_where_the_work_does(monkeypatch):
    bars = []
    make = click.progressbar
    monkeypatch.setattr(click, "progressbar", lambda **options: bars.append(make(**options)) or bars[-1])
    with bar() as progress:
        for what in ("first", "second"):
            for done in range(5):
                progress(done, 4, what)
                assert (bars[-1].label, bars[-1].pos) == (what, 25 * done)
    assert len(bars) == 2


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
        '[{"policy": "int8", "context": 9, "positions": [0, 5], "tokens": 9, "kld_mean": 0.1}]',
        '[{"policy": "int8", "context": 0, "positions": [0, 0], "tokens": 9, "kld_mean": 0.1}]',
    ],
)  # fmt: skip
def test_a_report_of_anything_else_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    done = CliRunner().invoke(evaluate, ["report", str(tmp_path / "rows.json")])
    assert done.exit_code == 1
    assert "rows.json" in done.output
    assert done.output.count("\n") == 1
