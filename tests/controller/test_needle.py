"""Retrieval through the cache: documents keep to their length and say what they ask for once, arms are held to the
exact cache, and a fork answers as a whole reading does."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest

from kvq.controller.evaluation.filler import Filler
from kvq.controller.evaluation.haystack import HOPS, KINDS, MOST, haystack
from kvq.controller.evaluation.needle import answers, documents, longest, measure, prompts
from kvq.controller.evaluation.report import needle_table
from kvq.controller.evaluation.scoring import score_answer
from kvq.exporter.calibration import calibration_text
from kvq.runtime.errors import CalibrationError, ContextError
from tests.tools.chats import chat_bundle
from tests.tools.checkpoints import small_tokenizer
from tests.tools.command_line import assert_one_line_error, kvq

SETTINGS = {"recent": 4, "sink": 2}
ASSIGNMENT = re.compile(r"The number of (\w+) is (?:(\d+)|the same as that of (\w+))\.")
SENTENCE = 80  # tokens of kvq-books that no sentence of filler exceeds


def made(model, kind, tokens=600, items=2, depths=3, filler=None, seed=0):
    return list(documents(model, kind, tokens, items, depths, filler or Filler(), seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "depths"), [(600, 1), (700, 4), (2048, MOST)])
def test_documents_are_as_long_as_asked_for_and_answer_every_question_once(kind, tokens, depths, embedded):
    for document, asked in made(embedded, kind, tokens, depths=depths):
        assert tokens - SENTENCE < longest(embedded, document) <= tokens
        assert len(document.questions) == len(asked) == depths
        for question in document.questions:
            assert len(re.findall(rf"\b{question.answer}\b", document.text)) == 1
            assert document.text.count(f"{question.begun} ") == 1
        if kind != "variables":
            for question in document.questions:
                assert f"{question.begun} {question.answer}." in document.text
            places = [document.text.index(question.answer) / len(document.text) for question in document.questions]
            assert np.allclose(places, [question.depth for question in document.questions], atol=0.25)


def test_what_is_too_long_to_be_encoded_at_all_is_cut_like_any_other(embedded):
    """Filler is far longer than what is asked for at first: more than a model encodes, if that is its whole context."""

    def length(document):
        if len(document.text) > 4000:
            raise ContextError("far more than there is room for")
        return longest(embedded, document)

    found, wanted = (
        haystack("single", 3, 600, Filler(), np.random.default_rng(0), of)
        for of in (length, partial(longest, embedded))
    )
    assert found.text == wanted.text


@pytest.mark.slow
def test_variables_can_be_followed_to_their_value(embedded):
    for document, _ in made(embedded, "variables", 1000, items=3, depths=6):
        values: dict[str, str] = {}
        # In the order of the text: nobody takes a value from one who has none yet.
        for name, value, of in re.findall(
            r"The number of (\w+) is (?:(\d+)|the same as that of (\w+))\.", document.text
        ):
            values[name] = value or values[of]
        assert len(values) == 6
        assert len(set(values.values())) == 6 // (1 + HOPS)
        for question in document.questions:
            assert values[question.begun.split()[3]] == question.answer


def test_documents_are_the_same_for_a_seed_and_others_for_another(embedded):
    first, again, other = (made(embedded, "multi", seed=seed) for seed in (0, 0, 1))
    assert first == again
    texts = [document.text for document, _ in (*first, *other)]
    assert len(set(texts)) == 4


def test_built_in_filler_does_not_repeat_itself():
    sentences = Filler().draw(8192, np.random.default_rng(0))
    assert len(set(sentences)) > 0.95 * len(sentences)


def test_filler_comes_from_the_text_given(embedded):
    text = calibration_text()
    document, _ = made(embedded, "single", 500, items=1, depths=2, filler=Filler(text, "text"))[0]
    rest = document.text
    for question in document.questions:
        rest = rest.replace(f"{question.begun} {question.answer}.", "")
    assert len(rest) < len(document.text)
    assert " ".join(rest.split()) in " ".join(text.split())


def test_a_text_without_sentences_is_cut_between_words():
    text = "word " * 3000
    pieces = Filler(text, "text").draw(200, np.random.default_rng(0))
    assert all(len(piece) <= 401 for piece in pieces)
    assert {word for piece in pieces for word in piece.split()} == {"word"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fp16", "int4", "mixed"])
def test_a_fork_answers_as_a_whole_reading_does(policy, embedded):
    _, asked = made(embedded, "multi", 400, items=1)[0]
    found, bits = answers(embedded, (policy, SETTINGS), asked)
    for (before, answer), (loglik, hit) in zip(asked, found, strict=True):
        session = embedded.session(policy, prefill="stepwise", **SETTINGS)
        session.append(before)
        assert score_answer(session, answer) == (pytest.approx(loglik, abs=5e-3), hit)
    assert bits == pytest.approx(session.stats().kv_used_bits)


@pytest.mark.slow
def test_an_arm_that_stores_all_at_16_bits_keeps_everything(embedded):
    arms = [("fp16", SETTINGS), ("k16v16", SETTINGS), ("int2", {"recent": 2048, "sink": 0}), ("int2", SETTINGS)]
    rows = measure(embedded, arms, [400], ["single"], items=2, depths=2)
    assert [row["arm"] for row in rows] == ["fp16", "k16v16", "int2", "int2"]
    exact, same, window, coarse = rows
    assert "kept" not in exact
    assert same["loglik_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert window["loglik_difference"]["mean"] == pytest.approx(0, abs=0.05)  # the window has 16-bit codes of its own
    assert abs(coarse["loglik_difference"]["mean"]) > 0.05
    for row in rows[1:]:
        assert row["kept"] is None if not exact["hits"] else row["kept"]["low"] <= row["kept"]["mean"] <= 1


@pytest.mark.slow
def test_a_chat_template_has_the_document_in_the_turn_of_the_system(tiny_checkpoint, tmp_path):
    from kvq.composition import open_bundle

    model = open_bundle(chat_bundle(tiny_checkpoint, small_tokenizer(490), "chatml", tmp_path / "chatml"))
    document, asked = made(model, "single", 256, items=1, depths=1)[0]
    text = model.tokenizer.decode([*asked[0][0], *asked[0][1]], skip_special_tokens=False)
    question = document.questions[0]
    assert text == (
        f"<|im_start|>system\n{document.text}<|im_end|>\n<|im_start|>user\n{question.asked}<|im_end|>\n"
        f"<|im_start|>assistant\n{question.begun} {question.answer}"
    )
    rewriting = open_bundle(chat_bundle(tiny_checkpoint, small_tokenizer(490), "rewriting", tmp_path / "rewriting"))
    before, _ = prompts(rewriting, document)[0]  # whose template puts what the system says into the question
    assert f"{document.text}\n\n{question.asked}" in rewriting.tokenizer.decode(before)


@pytest.mark.parametrize(("documents", "cell"), [(5, "(n = 5)"), (6, "(-0.20 to -0.10)")])
def test_too_few_documents_have_no_interval(documents, cell):
    row = {"kind": "single", "tokens": 512, "arm": "int4", "documents": documents, "bits": 7.0, "kv_bits": 3.25}
    row |= {"loglik": -1.0, "hits": 0.5, "loglik_difference": {"mean": -0.15, "low": -0.2, "high": -0.1}, "kept": None}
    table = needle_table([row])
    assert f"| -0.15 {cell} | 50% |  |" in table
    assert ("so few documents" in table) == (documents == 5)
    assert "docs/guide.md#policies-and-budgets" in table


COMMON = ["eval", "needle", "-m", "kvq-books", "--threads", "1"]


@pytest.mark.slow
def test_the_command_writes_rows_and_a_table(tmp_path):
    out = tmp_path / "rows.json"
    options = ["--tokens", "400,500", "--kinds", "single,variables", "--items", "2", "--depths", "2", "--recent", "0"]
    arms = ["-p", "int8", "-p", "adaptive", "-p", "fp16", "--kv-bits", "3,4"]
    done = kvq(*COMMON, *options, *arms, "--sink", "4", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    arms_of = [(row["arm"], row.get("kv_bits")) for row in rows if (row["kind"], row["tokens"]) == ("single", 400)]
    assert arms_of == [("fp16", None), ("int8", None), ("adaptive", 3), ("adaptive", 4)]
    assert {(row["kind"], row["tokens"]) for row in rows} == {
        ("single", 400), ("variables", 400), ("single", 500), ("variables", 500), ("all", None)
    }  # fmt: skip
    for row in rows:
        assert (row["documents"], row["questions"]) == ((8, 16) if row["kind"] == "all" else (2, 4))
        assert row["loglik"] < 0
        assert 0 <= row["hits"] <= 1
        # A budget is one of 1,024 tokens in texts that are shorter.
        assert "kv_bits" not in row or row["bits"] <= row["kv_bits"] * 1024 / (row["tokens"] or 400)
        if row["arm"] != "fp16":
            assert (
                row["loglik_difference"]["low"] <= row["loglik_difference"]["mean"] <= row["loglik_difference"]["high"]
            )
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    for row, line in zip(rows, table[2:], strict=True):
        # Of two documents there is no interval, of eight there is.
        assert (" (n = 2) " in line) == (row["arm"] != "fp16" and row["kind"] != "all")
        assert (" to " in line) == (row["arm"] != "fp16" and row["kind"] == "all")
    assert kvq("eval", "report", str(out)).stdout == done.stdout


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tokens", "4096"], 1, ["context of 2048", "--tokens"]),
        (["--tokens", "100", "--depths", "12"], 1, ["too few", "--depths"]),
        (["--tokens", "1500", "--text", "short.txt"], 1, ["short.txt is too short", "--text"]),
        (["--text", "none.txt"], 1, ["cannot read none.txt"]),
        (["--text", "empty.txt"], 1, ["no text in it"]),
        (["--text", "latin.txt"], 1, ["not UTF-8"]),
        (["-p", "int5"], 2, ["int5"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line(options, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("One sentence. Another one.")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    assert_one_line_error(kvq(*COMMON, *options), *words, code=code)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kinds", "single,double"], ["--kinds", "double"]),
        (["--tokens", "many"], ["--tokens"]),
        (["--kv-bits", "three"], ["--kv-bits"]),
        (["--depths", "13"], ["--depths"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_usage_is_one_line(options, words):
    assert_one_line_error(kvq(*COMMON, *options), *words, code=2, who="Error")


@pytest.mark.slow
def test_too_short_a_text_is_refused_before_any_arm_is_measured(embedded):
    with pytest.raises(CalibrationError, match="too short"):
        measure(embedded, [("fp16", {})], [400, 2000], filler=Filler("It was late in the year. " * 100, "text"))
