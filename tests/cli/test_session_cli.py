"""Session files on the command line: kvq prefill, kvq info, kvq-run --session; real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from kvq.composition import open_bundle
from tests.tools.command_line import assert_one_line_error, kvq, run

SEEDED = ["-t", "1.1", "-s", "3"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "story.kvq"


def with_session(bundle, path, *arguments, **options):
    return run(bundle, "--session", str(path), *arguments, **options)


@pytest.mark.slow
def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(tiny_bundle, path):
    whole = run(tiny_bundle, "-q", *SEEDED, "-n", "24", "Hello")
    parts = []
    for count, prompt in (("7", ["Hello"]), ("16", []), ("1", [])):
        done = with_session(tiny_bundle, path, "-q", *SEEDED, "-n", count, *prompt)
        assert (done.returncode, done.stderr) == (0, "")
        parts.append(done.stdout.removesuffix("\n"))
    assert "".join(parts) + "\n" == whole.stdout


@pytest.mark.slow
def test_what_is_done_with_the_file_is_said_on_stderr(tiny_bundle, path):
    made = with_session(tiny_bundle, path, "-p", "int4", "Hello")
    assert made.stderr.splitlines()[0] == f"new session {path}"
    assert made.stderr.splitlines()[-1].startswith(f"{path}: saved ")
    again = with_session(tiny_bundle, path, " and")
    assert again.stderr.splitlines()[0].startswith(f"{path}: going on after ")
    assert "policy int4" in again.stderr.splitlines()[0]
    assert again.stdout.count("\n") >= 1
    assert "kvq" not in again.stdout


@pytest.mark.slow
def test_json_tells_of_the_session(tiny_bundle, path):
    made = json.loads(with_session(tiny_bundle, path, "--json", "Hello").stdout)
    assert made["session"] == {"path": str(path), "loaded_tokens": 0, "saved": True}
    tokens = made["stats"]["tokens"]
    done = with_session(tiny_bundle, path, "--json", "--session-readonly", " and")
    assert done.stderr == ""
    assert json.loads(done.stdout)["session"] == {"path": str(path), "loaded_tokens": tokens, "saved": False}


@pytest.mark.slow
def test_a_document_read_once_is_asked_many_questions(tiny_bundle, tmp_path, path):
    document = tmp_path / "doc.txt"
    document.write_text("Once upon a time there was a ship. " * 5)
    done = kvq("prefill", str(document), "-o", str(path), "-m", str(tiny_bundle), "-p", "int8", "--recent", "4")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"{path}: " in done.stderr
    assert "policy int8" in done.stderr
    before = path.read_bytes()
    questions = [" Who", " Where", " Who"]
    answers = [with_session(tiny_bundle, path, "--session-readonly", question) for question in questions]
    assert path.read_bytes() == before
    assert answers[0].stdout == answers[2].stdout != answers[1].stdout
    assert answers[0].stderr.splitlines()[-1] == f"{path} was left as it is"
    # The same text in one go, through the library.
    session = open_bundle(tiny_bundle).session("int8", recent=4)
    session.append(session.model.encode(document.read_text().rstrip("\n")))
    text = "".join(r.text for r in session.generate(" Who", max_tokens=12, temperature=0, ignore_eos=True))
    assert answers[0].stdout == text + "\n"


def test_the_text_of_a_later_prompt_gets_no_special_tokens(tiny_model, path, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    session = tiny_model.session()
    bos = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    monkeypatch.setattr(
        tiny_model, "optional_tokenizer", type(tiny_model.tokenizer).from_str(tiny_model.tokenizer.to_str())
    )
    tiny_model.tokenizer.post_processor = bos
    list(session.generate("Hello", max_tokens=1))
    session.save(path)
    loaded = tiny_model.load_session(path)
    list(loaded.generate(" and", max_tokens=1, temperature=0))
    assert loaded.tokens[0] == 0
    assert 0 not in loaded.tokens[1:]


def test_the_resume_benchmark_measures_what_it_has_checked(tiny_model, path):
    from kvq.bench.resume import measure

    row = measure(tiny_model, "fp16", 1000, path)
    assert (row["tokens"], row["policy"]) == (248, "fp16")
    assert row["file_bytes"] == path.stat().st_size
    assert path.exists()


@pytest.mark.slow
def test_prefill_does_not_replace_a_file_unasked(tiny_bundle, tmp_path, path):
    document = tmp_path / "doc.txt"
    document.write_text("Hello")
    path.write_text("precious")
    arguments = ["prefill", str(document), "-o", str(path), "-m", str(tiny_bundle), "-q"]
    assert_one_line_error(kvq(*arguments), "exists already", "--overwrite")
    assert path.read_text() == "precious"
    done = kvq(*arguments, "--overwrite")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (
        kvq("prefill", "-", "-o", str(path), "--overwrite", "-q", "-m", str(tiny_bundle), input="Hello").returncode == 0
    )


@pytest.mark.slow
def test_info_of_a_session_and_of_a_bundle(tiny_bundle, path):
    with_session(tiny_bundle, path, "-p", "mixed", "--recent", "3", "Hello")
    done = kvq("info", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("session of ", "policy mixed; recent 3, sink 4", "model tiny", "recent 3"):
        assert part in done.stdout
    found = json.loads(kvq("info", "--json", str(path)).stdout)
    assert (found["kind"], found["policy"], found["nbytes"]) == ("session", "mixed", path.stat().st_size)
    assert sum(row["tokens"] for row in found["precisions"].values()) == found["tokens"]
    done = kvq("info", str(tiny_bundle))
    assert (done.returncode, done.stderr) == (0, "")
    assert "bundle of tiny" in done.stdout
    found = json.loads(kvq("info", str(tiny_bundle), "--json").stdout)
    assert (found["kind"], found["architecture"]["layers"]) == ("bundle", 3)
    assert "bundle of kvq-books" in kvq("info", "kvq-books").stdout


def test_info_of_a_hostile_file_does_not_write_to_the_terminal(tiny_model, path):
    session = tiny_model.session()
    session.metadata = {"title": "\x1b[2J\x07\u202e\n"}
    session.append([1])
    session.save(path)
    out = kvq("info", str(path)).stdout
    assert not set(out) & set("\x1b\x07\u202e")
    assert out.count("\n") == 5


@pytest.mark.parametrize("command", [["info"], ["run", "-m", "BUNDLE", "--session"]], ids=["info", "run"])
def test_a_file_that_is_no_session_is_a_one_line_error_and_stays(tiny_bundle, path, command):
    path.write_text("Once upon a time")
    command = [str(tiny_bundle) if part == "BUNDLE" else part for part in command]
    rest = ["Hello"] if command[0] == "run" else []
    assert_one_line_error(kvq(*command, str(path), *rest), "is not a session file")
    assert path.read_text() == "Once upon a time"


@pytest.mark.slow
def test_wrong_uses_of_a_session_are_one_line_errors(tiny_bundle, tmp_path, path):
    done = run(tiny_bundle, "--session-readonly", "Hello")
    assert done.returncode == 2
    assert "--session FILE" in done.stderr
    assert_one_line_error(with_session(tiny_bundle, path, "--session-readonly", "Hello"), "no session file")
    assert_one_line_error(with_session(tiny_bundle, tmp_path / "no" / "x.kvq", "Hello"), "there is no folder")
    assert_one_line_error(with_session(tiny_bundle, path), "the prompt is empty")
    assert not path.exists()
    with_session(tiny_bundle, path, "Hello")
    before = path.read_bytes()
    assert_one_line_error(with_session(tiny_bundle, path, "--recent", "5", " and"), "was made with --recent 16")
    assert_one_line_error(with_session(tiny_bundle, path, ""), "the prompt is empty")
    assert_one_line_error(with_session(tiny_bundle, path, "-p", "int5", " and"), "unknown policy", code=2)
    assert_one_line_error(run("kvq-books", "--session", str(path), " and"), "belongs to the model")
    assert path.read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_saves_what_was_said_and_the_next_run_goes_on_there(tiny_bundle, path):
    arguments = [
        sys.executable,
        "-m",
        "kvq",
        "run",
        "-m",
        str(tiny_bundle),
        "--session",
        str(path),
        "--ignore-eos",
        "-s",
        "1",
    ]
    process = subprocess.Popen(
        [*arguments, "-n", "-1", "--backend", "numpy", "Hello"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    first = process.stdout.read(20)  # unbuffered: communicate reads past what a buffer holds
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=120)
    assert b"Traceback" not in stderr
    assert stderr.decode().splitlines()[-1].startswith(f"{path}: saved ")
    assert process.returncode == (130 if b"interrupted after" in stderr else 0)
    said = (first + rest).decode().removesuffix("\n")
    whole = run(tiny_bundle, "-q", "-t", "0.8", "-n", "-1", "-s", "1", "--backend", "numpy", "Hello").stdout
    assert whole.startswith(said)
    done = with_session(tiny_bundle, path, "-q", "-t", "0.8", "-n", "5", "-s", "1", "--backend", "numpy")
    if process.returncode == 130:
        assert whole.startswith(said + done.stdout.removesuffix("\n"))


def test_ctrl_c_while_the_prompt_is_read_leaves_the_file_alone(tiny_bundle, path):
    code = (
        "import sys, os, signal\n"
        "from kvq.runtime.session.session import Session\n"
        "step = Session.step\n"
        "def interrupted(self, ids, *rest):\n"
        "    step(self, ids, *rest)\n"
        "    if len(ids) > 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "Session.step = interrupted\n"
        "from kvq.runtime.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "run", "-m", str(tiny_bundle), "--session", str(path), "Hello there"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert os.listdir(path.parent) == []
