"""What is typed in a chat besides questions: pasted lines, quotes, history, options, and a context that is full."""

from __future__ import annotations

import json
import os
import re
import stat

import pytest

from kvq.runtime.cli.keyboard import MOST_LINES, History
from tests.cli.test_cli_chat import Terminal, chat


@pytest.mark.slow
def test_commands_of_a_script(tiny_bundle):
    lines = [
        "Hello", "/context", "/system Be kind.", "/context", "/regenerate", "/set", "/set top-k 5", "/set max_tokens 3",
        "/set seed none", "Why?", "/context",
    ]  # fmt: skip
    done = chat(tiny_bundle, input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    for words in ("tokens (", "1 turn", "a new system prompt", "temperature 0.0", "top_k 5", "max_tokens 3",
                  "seed None", "(cut after 3 tokens", "2 turns"):  # fmt: skip
        assert words in done.stderr
    assert done.stdout.count("\n") >= 3  # three answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/regenrate", "did you mean /regenerate?"), ("/zzz", "/help lists them"), ("/regenerate", "no turns yet"),
        ("/set temprature 1", "did you mean temperature?"), ("/set temperature hot", "cannot be 'hot'"),
        ("/set temperature -1", "temperature must be at least 0"),
        ("/set max_tokens 0", "max_tokens must be at least 1"), ("/set top_k 1 2", "takes 2 arguments"),
        ("/save", "takes 1 argument"),
    ],
)  # fmt: skip
def test_what_is_no_command_is_told(tiny_bundle, line, words):
    done = chat(tiny_bundle, input=line + "\n")
    assert done.returncode == (2 if line.startswith("/set") and "2" not in line else 1)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.slow
def test_lines_between_quotes_are_one_question(tiny_bundle):
    done = chat(tiny_bundle, input='"""One\ntwo\n\nthree"""\nFour\n/context\n')
    assert "2 turns" in done.stderr
    assert chat(tiny_bundle, input='"""Never\nclosed\n').stdout


@pytest.mark.slow
def test_pasted_lines_are_one_question_and_history_stays(tiny_bundle, tmp_path):
    pytest.importorskip("readline")
    home = tmp_path / "home"
    options = {"whole": True, "env": {"KVQ_HOME": str(home), "TERM": "xterm"}}
    terminal = Terminal("-m", str(tiny_bundle), "-n", "3", **options)
    terminal.until("> ")
    terminal.type("\x1b[200~first line\nsecond line\nthird\x1b[201~\r")
    terminal.until("cut after 3")
    terminal.type("/context\r")
    terminal.until("1 turn")
    terminal.type("/quit\r")
    terminal.end()
    kept = home / "history"
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o600
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert found == ["first line\nsecond line\nthird", "/context", "/quit"]
    terminal = Terminal("-m", str(tiny_bundle), "-n", "3", **options)
    terminal.until("> ")
    terminal.type("\x1b[A\x1b[A\r")  # two back: /context
    terminal.until("0 turns")
    terminal.type("/quit\r")
    terminal.end()


def test_a_history_is_bounded_and_survives_what_is_in_its_file(tmp_path):
    history = History(tmp_path / "kept" / "history")
    told = []
    history.add_to = told.append
    for entry in ("one", "two\nlines", "  ", "\0", "x" * 10_000, "é日"):
        history.add(entry)
    assert history.entries() == told == ["one", "two\nlines", "é日"]
    history.path.write_bytes(b'"good"\n' + b"[" * 100_000 + b'\n{\n[1]\n\xff\xfe\n""\n"last"\n')
    assert history.entries() == ["good", "last"]
    history.path.write_text("".join(json.dumps("word " * 700) + "\n" for _ in range(MOST_LINES + 50)))
    history.add("newest")
    assert len(history.entries()) <= MOST_LINES
    assert history.entries()[-1] == "newest"
    assert history.path.stat().st_size < 3 * 10**6
    away = History(tmp_path / "a file" / "history")
    (tmp_path / "a file").write_text("no folder")
    away.add("kept for this run")
    assert away.entries() == []


@pytest.mark.slow
def test_three_hundred_turns_run_through_and_what_is_forgotten_is_said(tiny_bundle):
    """Nothing stops: neither a question that does not fit any more nor an answer that fills the context."""
    lines = "".join(f"Question {turn}?\n" for turn in range(300)) + "/context\n"
    done = chat(tiny_bundle, "-n", "6", "--system", "Be brief.", input=lines)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"the oldest (?:(\d+) turns are|turn is) forgotten\)", done.stderr)
    gone = sum(int(count or 1) for count in said)
    left = int(re.search(r"(\d+) turns?, (\d+) forgotten$", done.stderr.strip())[1])
    assert gone + left == 300
    assert done.stderr.strip().endswith(f"{gone} forgotten")


@pytest.mark.slow
def test_an_answer_longer_than_what_is_left_goes_on(tiny_bundle, tiny_model):
    lines = "One?\nTwo?\nThree?\n"
    most = tiny_model.architecture.context - 60
    done = chat(tiny_bundle, "-n", str(most), input=lines)
    assert done.returncode == 0, done.stderr
    assert "forgotten)" in done.stderr
    assert done.stderr.count(f"(cut after {most} tokens") == 3


@pytest.mark.slow
def test_an_answer_longer_than_the_context_loses_its_beginning(tiny_bundle, tiny_model):
    context = tiny_model.architecture.context
    for given, most in ((context + 100, context + 100), (-1, context)):
        done = chat(tiny_bundle, "-n", str(given), "--ignore-eos", input="One?\nTwo?\n")
        assert done.returncode == 0, done.stderr
        assert "the beginning of this answer is forgotten)" in done.stderr
        assert "the oldest turn is forgotten)" in done.stderr
        assert done.stderr.count(f"(cut after {most} tokens") == 2
