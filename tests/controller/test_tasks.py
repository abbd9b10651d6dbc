"""Tasks through the cache: the harness's figures against transformers' own log-probabilities."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from kvq.controller.evaluation import latency
from kvq.controller.evaluation.cli import evaluate
from kvq.controller.evaluation.items import items_of
from kvq.runtime.errors import CalibrationError
from tests.tools.command_line import assert_one_line_error, kvq
from tests.tools.references import reference_logits

ITEMS = [
    {"query": "The captain looked at the", "choices": ["sea", "window of the house", "old man"], "gold": 0},
    {"query": "It was late and", "choices": ["the rain", "he went to his room", "a"], "gold": 1},
    {"query": "She said that", "choices": ["she had been there before", "no"], "gold": 1},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "sea.jsonl").write_text("".join(json.dumps({"id": i, **item}) + "\n" for i, item in enumerate(ITEMS)))
    return folder


def command(arguments, out):
    pytest.importorskip("lm_eval")
    result = CliRunner().invoke(evaluate, [*map(str, arguments), "--json", str(out)])
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())


def scores_of(model, checkpoint, query, choices):
    """Log-probabilities of choices after a query by transformers, over whole sequences, without a cache."""
    scores = []
    for choice in choices:
        kept, whole = model.encode(query), model.encode(query + " " + choice)
        logp = reference_logits(checkpoint, whole).log_softmax(-1)
        scores.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(kept), len(whole))))
    return scores


def expected(model, checkpoint):
    """acc and acc_norm by transformers."""
    right, normed = [], []
    for item in ITEMS:
        scores = scores_of(model, checkpoint, item["query"], item["choices"])
        right.append(np.argmax(scores) == item["gold"])
        normed.append(np.argmax([s / len(c) for s, c in zip(scores, item["choices"], strict=True)]) == item["gold"])
    return np.mean(right), np.mean(normed)


@pytest.mark.slow
def test_the_16_bit_arm_scores_as_transformers_does(tiny_model, tiny_bundle, tiny_checkpoint, data, tmp_path):
    options = ["tasks", "-m", tiny_bundle, "--tasks", "sea", "--data", data, "-p", "fp16", "-p", "int8", "--recent", 2]
    rows = command(options, tmp_path / "rows.json")
    acc, acc_norm = expected(tiny_model, tiny_checkpoint)
    assert [row["arm"] for row in rows] == ["fp16", "int8"]
    assert (rows[0]["acc"], rows[0]["acc_norm"]) == (pytest.approx(acc), pytest.approx(acc_norm))
    assert all(row["items"] == 3 and row["recent"] == 2 for row in rows)
    assert rows[1]["acc_difference"]["low"] <= rows[1]["acc_difference"]["high"]


def test_single_log_probabilities_are_transformers_own(tiny_model, tiny_checkpoint):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from kvq.controller.evaluation.tasks import CacheLM

    context, choice = ITEMS[1]["query"], " " + ITEMS[1]["choices"][1]
    other = Instance("loglikelihood", {}, (context + "!", choice), 0)  # contexts do not get mixed up
    wanted = Instance("loglikelihood", {}, (context, choice), 1)
    lm = CacheLM(tiny_model, "fp16")
    (_, (found, _)), ((again, _),) = lm.loglikelihood([other, wanted]), lm.loglikelihood([wanted])
    assert found == again
    kept, whole = tiny_model.encode(context), tiny_model.encode(context + choice)
    logp = reference_logits(tiny_checkpoint, whole).log_softmax(-1)
    assert found == pytest.approx(sum(float(logp[i - 1, whole[i]]) for i in range(len(kept), len(whole))), abs=5e-3)


def test_examples_stand_in_front_of_every_item_and_are_not_asked(tiny_model, data):
    pytest.importorskip("lm_eval")
    from kvq.controller.evaluation.tasks import local_task

    seen = set()
    for seed in range(6):
        task = local_task("sea", data / "sea.jsonl", shots=1, seed=seed)
        asked = list(task.test_docs())
        (shown,) = [item for item in ITEMS if item["query"] not in {item["query"] for item in asked}]
        example = f"{shown['query']} {shown['choices'][shown['gold']]}\n\n"
        assert [task.fewshot_context(item, 1) for item in asked] == [example + item["query"] for item in asked]
        seen.add(shown["query"])
    assert len(seen) > 1  # the seed draws them


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--recent", "0", "--sink", "0"]], ids=" ".join)
def test_the_16_bit_arm_scores_examples_as_transformers_does(options, tiny_model, tiny_checkpoint, data, tmp_path):
    common = ["tasks", "-m", tiny_model.path, "--tasks", "sea", "--data", data, "--shots", "2", "--seed", "1"]
    rows = command([*common, "-p", "fp16", "-p", "int8", *options], tmp_path / "rows.json")
    from kvq.controller.evaluation.tasks import local_task

    task = local_task("sea", data / "sea.jsonl", shots=2, seed=1)
    (item,) = task.test_docs()
    scores = scores_of(tiny_model, tiny_checkpoint, task.fewshot_context(item, 2), item["choices"])
    assert [(row["arm"], row["shots"], row["items"]) for row in rows] == [("fp16", 2, 1), ("int8", 2, 1)]
    assert rows[0]["acc"] == float(np.argmax(scores) == item["gold"])
    assert not options or rows[1]["bits"] < 12  # neither window nor sinks at 16 bits; heads of 8 have costly scales


@pytest.mark.parametrize("policy", ["fp16", "int4"])
def test_what_all_contexts_begin_with_is_read_once_and_scores_alike(policy, tiny_model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from kvq.controller.evaluation.tasks import STEM, CacheLM

    front = "The old man and the sea were both there. " * 6
    asked = [(front + item["query"], " " + choice) for item in ITEMS for choice in item["choices"]]
    assert len(tiny_model.encode(front)) > STEM
    together, alone = CacheLM(tiny_model, policy, recent=2), CacheLM(tiny_model, policy, recent=2)
    found = together.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    for pair, (loglik, _) in zip(asked, found, strict=True):
        session = tiny_model.session(policy, prefill="stepwise", recent=2)
        kept, answer = alone._encoded(*pair)
        session.append(kept)
        assert loglik == pytest.approx(alone._score(session, answer)[0], abs=2e-2)


NO_ITEMS = {
    "a list": [1],
    "no choices": {"query": "q", "choices": [], "gold": 0},
    "a text for choices": {"query": "q", "choices": "ab", "gold": 0},
    "an object for choices": {"query": "q", "choices": {"0": "a"}, "gold": 0},
    "numbers for choices": {"query": "q", "choices": [1, 2], "gold": 0},
    "null for a choice": {"query": "q", "choices": ["a", None], "gold": 0},
    "an empty choice": {"query": "q", "choices": ["a", ""], "gold": 0},
    "half a surrogate pair in a choice": {"query": "q", "choices": ["a", "\udfff"], "gold": 0},
    "half a surrogate pair in a query": {"query": "\ud800", "choices": ["a"], "gold": 0},
    "a number for a query": {"query": 3, "choices": ["a"], "gold": 0},
    "true for gold": {"query": "q", "choices": ["a", "b"], "gold": True},
    "half of gold": {"query": "q", "choices": ["a", "b"], "gold": 0.5},
    "a text for gold": {"query": "q", "choices": ["a", "b"], "gold": "0"},
    "gold below nought": {"query": "q", "choices": ["a", "b"], "gold": -1},
    "gold of 400 digits": {"query": "q", "choices": ["a", "b"], "gold": 10**400},
}


@pytest.mark.parametrize("name", NO_ITEMS)
def test_a_line_that_is_no_item_is_named(name, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(ITEMS[0]) + "\n\n" + json.dumps(NO_ITEMS[name]) + "\n")
    with pytest.raises(CalibrationError, match=r"bad.jsonl:3 is no item"):
        items_of("bad", tmp_path / "bad.jsonl")


def test_what_else_a_line_says_is_left_out(tmp_path):
    lines = [
        '{"query": "123", "choices": ["4\u2028", " "], "gold": 1, "x": 1e400}',
        '{"query": "{{ 1/0 }}", "choices": ["\\u0000"], "gold": 0, "x": {"y": []}}',
    ]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert items_of("odd", tmp_path / "odd.jsonl") == [
        {"query": "123", "choices": ["4\u2028", " "], "gold": 1},
        {"query": "{{ 1/0 }}", "choices": ["\0"], "gold": 0},
    ]


def test_texts_that_look_like_numbers_or_templates_are_asked_as_they_stand(tiny_model, tmp_path):
    pytest.importorskip("lm_eval")
    from kvq.controller.evaluation.tasks import run_tasks

    texts = ("123", "\u00b2", "{{ 1/0 }}", "[1, 2]", "")
    lines = [json.dumps({"query": text, "choices": ["7", "['a']"], "gold": 1, "x": text or 1}) for text in texts]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    (row,) = run_tasks(tiny_model, [("fp16", {})], ["odd"], tmp_path)
    assert row["items"] == len(texts)


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (None, [], ["no task file", "--data"]),
        (ITEMS, ["--shots", "3"], ["3 items", "--shots"]),
        ([{"query": "a", "choices": ["b"], "gold": 1}], [], ["bad.jsonl:1 is no item"]),
        ([ITEMS[0], {"query": "a"}], [], ["bad.jsonl:2 is no item"]),
        ([], [], ["no text in it"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_files_that_are_no_task_are_refused_in_one_line(lines, options, words, tiny_bundle, tmp_path):
    pytest.importorskip("lm_eval")
    if lines is not None:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = kvq("eval", "tasks", "-m", tiny_bundle, "--tasks", "bad", "--data", tmp_path, *options)
    assert_one_line_error(done, *words)


@pytest.mark.slow
def test_the_paper_s_table_has_accuracy_and_times_of_every_policy(tiny_bundle, data, tmp_path):
    pytest.importorskip("lm_eval")
    for task in ("hellaswag", "openbookqa", "arc_challenge"):
        shutil.copy(data / "sea.jsonl", tmp_path / f"{task}.jsonl")
    out = tmp_path / "rows.json"
    common = ["eval", "paper-table", "--models", tiny_bundle, "--data", tmp_path, "--recent", "4", "--kv-bits", "7"]
    done = kvq(*common, "--threads", "1", "--latency", "40,70", "--limit", "2", "--json", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    asked, timed = [row for row in rows if "acc" in row], [row for row in rows if "cached" in row]
    arms = ["fp16", "int8", "int4", "rule"]
    assert [row["arm"] for row in asked if row["task"] == "hellaswag"] == arms
    assert [(row["cached"], row["arm"]) for row in timed] == [(n, arm) for n in (40, 70) for arm in arms]
    for row in timed:
        assert row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1]
        assert ("of_first" in row) == (row["arm"] != "fp16")
    bits = {row["arm"]: row["bits"] for row in timed if row["cached"] == 70}
    assert bits["fp16"] > bits["int8"] > bits["int4"]  # measured behind what was read
    table = done.stdout.splitlines()
    assert table[2].startswith("| arm | hellaswag, bits |")
    assert table[2].endswith("| ms behind 40 | ms behind 70 |")
    assert [line.split(" | ")[0] for line in table[4:8]] == ["| fp16", "| int8", "| int4", "| rule at 7"]
    assert all(line.count(" | ") == 5 for line in table[4:8])
    assert all(line.count(" (n = 2), ") == 3 for line in table[5:8])  # of two items there is no interval
    legend = " ".join(table[8:])
    assert all(word in legend for word in ("acc / acc_norm in %", "in the same round", "so few items"))
    assert max(row["bits"] for row in rows if "kv_bits" in row) > 7.3
    assert "docs/guide.md#policies-and-budgets" in legend
    assert kvq("eval", "report", out).stdout == done.stdout


@pytest.mark.parametrize(("lengths", "code", "word"), [("9000", 1, "room for"), ("few", 2, "--latency")])
def test_steps_that_cannot_be_timed_are_refused_before_tasks_are_read(lengths, code, word, tiny_bundle, tmp_path):
    pytest.importorskip("lm_eval")
    done = kvq("eval", "paper-table", "--models", tiny_bundle, "--data", tmp_path, "--latency", lengths)
    assert_one_line_error(done, word, lengths, code=code, who="kvq" if code == 1 else "Error")


def test_steps_are_timed_behind_as_many_tokens_as_asked_and_all_arms_read_the_same(tiny_model, monkeypatch):
    read = []
    session = type(tiny_model).session

    def noted(self, policy, **options):
        read.append(session(self, policy, **options))
        return read[-1]

    monkeypatch.setattr(type(tiny_model), "session", noted)
    longest = latency.room(tiny_model)
    latency.measure(tiny_model, [("fp16", {}), ("int4", {"recent": 2})], [30, longest])
    texts = [each.tokens for each in read]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert len(texts[0]) == 30 + latency.ROUNDS * latency.STEPS
    assert len(texts[2]) == tiny_model.architecture.context


def test_a_budget_that_cannot_be_is_refused_before_tasks_are_read(tiny_bundle, tmp_path):
    pytest.importorskip("lm_eval")
    common = ["eval", "tasks", "-m", tiny_bundle, "--tasks", "none", "--data", tmp_path, "-p", "fp16", "-p", "rule"]
    done = kvq(*common, "--kv-bits", "2")
    assert_one_line_error(done, "kv_bits 2 is below", code=2)
