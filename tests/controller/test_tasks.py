"""Tasks through the cache: the harness's figures against transformers' own log-probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from kvq.controller.evaluation.cli import evaluate
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


def expected(model, checkpoint):
    """acc and acc_norm by transformers, over whole sequences, without a cache."""
    right, normed = [], []
    for item in ITEMS:
        scores = []
        for choice in item["choices"]:
            kept, whole = model.encode(item["query"]), model.encode(item["query"] + " " + choice)
            logp = reference_logits(checkpoint, whole).log_softmax(-1)
            scores.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(kept), len(whole))))
        right.append(np.argmax(scores) == item["gold"])
        normed.append(np.argmax([s / len(c) for s, c in zip(scores, item["choices"], strict=True)]) == item["gold"])
    return np.mean(right), np.mean(normed)


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


def test_a_missing_task_file_is_refused(tiny_bundle, tmp_path):
    pytest.importorskip("lm_eval")
    options = ["tasks", "-m", str(tiny_bundle), "--tasks", "none", "--data", str(tmp_path)]
    result = CliRunner().invoke(evaluate, options)
    assert "no task file" in str(result.exception)
