"""``kvq batch``: every line of a file answered once, whatever happens to the process; real processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvq.runtime.errors import BatchError
from kvq.runtime.files import try_lock
from kvq.runtime.server import batch
from kvq.runtime.server.batch import Asked, seed_of
from kvq.runtime.server.batchfiles import Answers, Requests, mark
from tests.tools.command_line import assert_one_line_error, kvq
from tests.tools.serving import library

WORDS = ["The ship", "The sea", "A whale", "Ahab said", "In the morning", "The captain"]


def completion(custom_id: str, prompt: str, **fields) -> dict:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, content: str, **fields) -> dict:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def written(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, dict]:
    """Lines of an output by custom_id; each is there once, and whole."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {line["custom_id"]: line for line in found}
    assert len(by_id) == len(found)
    return by_id


def bodies(path: Path) -> dict[str, dict]:
    return {custom_id: line["response"]["body"] for custom_id, line in answers(path).items()}


def texts(path: Path) -> dict[str, list[str]]:
    """Texts of all choices of all answers."""
    return {
        custom_id: [each["text"] if "text" in each else each["message"]["content"] for each in body["choices"]]
        for custom_id, body in bodies(path).items()
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.mark.slow
def test_answers_have_the_form_of_the_api_and_the_text_of_the_library(embedded, tmp_path, out):
    source = written(
        tmp_path / "in.jsonl",
        [
            completion("text", "The ship", max_tokens=12),
            chat("chat", "Where is the captain?"),
            "",
            completion("several", ["The sea", "The whale"], n=2, temperature=1.0, seed=5),  # type: ignore[arg-type]
            completion("drawn", "The whale", temperature=1.0),
        ],
    )
    done = kvq("batch", source, out)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{out}: 4 answered, 0 of them by an error | prompts ")
    lines = answers(out)
    assert set(lines) == {"text", "chat", "several", "drawn"}
    for line in lines.values():
        assert set(line) == {"id", "custom_id", "response", "error"}
        assert line["error"] is None
        assert set(line["response"]) == {"status_code", "request_id", "body"}
        assert line["response"]["status_code"] == 200
    assert lines["text"]["response"]["body"]["object"] == "text_completion"
    assert lines["chat"]["response"]["body"]["object"] == "chat.completion"
    assert lines["chat"]["response"]["body"]["usage"]["completion_tokens"] == 6
    said = texts(out)
    greedy = {"temperature": 0, "max_tokens": 12}
    assert said["text"] == [library(embedded, "The ship", **greedy)]
    ids = embedded.chat_template.encode([{"role": "user", "content": "Where is the captain?"}], True)
    alone = library(embedded, ids, max_tokens=6, temperature=0, stop=embedded.chat_template.stop)
    assert said["chat"] == [alone]
    assert said["several"] == [
        library(embedded, prompt, max_tokens=6, temperature=1.0, seed=seed)
        for prompt in ("The sea", "The whale")
        for seed in (5, 6)
    ]
    seed = bodies(out)["drawn"]["kvq"]["seed"]
    assert seed == seed_of("drawn")
    assert "seed" not in bodies(out)["several"]["kvq"]
    assert said["drawn"] == [library(embedded, "The whale", max_tokens=6, temperature=1.0, seed=seed)]


@pytest.mark.slow
def test_an_answer_depends_on_its_line_alone(tmp_path, out):
    shared = "The harbour lay in the first light of a grey morning, and the boats came home. " * 12
    lines = [completion(str(i), shared + word, temperature=1.0) for i, word in enumerate(WORDS)]
    source = written(tmp_path / "in.jsonl", lines)
    assert kvq("batch", source, out).returncode == 0
    turned, alone = tmp_path / "turned.jsonl", tmp_path / "alone.jsonl"
    assert kvq("batch", written(tmp_path / "reversed.jsonl", lines[::-1]), turned).returncode == 0
    assert kvq("batch", "--parallel", "1", source, alone).returncode == 0
    assert texts(turned) == texts(out) == texts(alone)
    assert list(texts(alone)) == [line["custom_id"] for line in lines]
    cached = [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies(out).values()]
    assert sorted(map(bool, cached)) == [False, *[True] * 5]  # what all begin with is read once, though all are at work


@pytest.mark.slow
def test_a_refused_line_has_its_error_and_the_others_their_answers(tmp_path, out):
    good = completion("good", "The ship")
    bad = {
        "stream": (completion("stream", "x", stream=True), 400, "stream"),
        "url": ({**good, "custom_id": "url", "url": "/v1/embeddings"}, 404, "url"),
        "method": ({**good, "custom_id": "method", "method": "GET"}, 400, "method"),
        "line field": ({**good, "custom_id": "line field", "priority": 1}, 400, "priority"),
        "no body": ({**good, "custom_id": "no body", "body": None}, 400, "body"),
        "field": (completion("field", "x", tempature=1), 400, "tempature"),
        "range": (completion("range", "x", top_p=2), 400, None),
        "model": (completion("model", "x", model="gpt-9"), 404, "model"),
        "second prompt": (completion("second prompt", ["x", [1 << 40]]), 400, "prompt"),  # type: ignore[arg-type]
        "long": (completion("long", "word " * 5000), 400, None),
    }
    source = written(tmp_path / "in.jsonl", [*(line for line, _, _ in bad.values()), good])
    done = kvq("batch", source, out)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"{len(bad) + 1} answered, {len(bad)} of them by an error" in done.stderr
    found = answers(out)
    assert set(found) == {*bad, "good"}
    for custom_id, (_, status, param) in bad.items():
        response = found[custom_id]["response"]
        assert (response["status_code"], response["body"]["error"]["param"]) == (status, param), response
        assert found[custom_id]["error"] is None
    assert found["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert found["good"]["response"]["status_code"] == 200


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_at_any_moment_every_line_is_answered_once(tmp_path, out):
    lines = [completion(f"line {i}", f"{WORDS[i % 6]} {i}", temperature=1.0, max_tokens=4) for i in range(120)]
    source = written(tmp_path / "in.jsonl", lines)
    whole = tmp_path / "whole.jsonl"
    assert kvq("batch", source, whole).returncode == 0
    draw, kills = random.Random(23), 0
    for moment in range(6):
        process = subprocess.Popen([sys.executable, "-m", "kvq", "batch", "-q", source, out], stderr=subprocess.DEVNULL)
        before = out.stat().st_size if out.exists() else 0
        while process.poll() is None and (not out.exists() or out.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02 * (moment + 1)))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        with out.open("ab") as file:  # what a kill in the middle of a write leaves
            file.write(out.read_bytes().splitlines()[0][: draw.randrange(40)])
    assert kills  # or nothing was tried
    assert len(out.read_bytes().splitlines()) < len(lines)
    done = kvq("batch", source, out)
    assert done.returncode == 0, done.stderr
    assert "were there" in done.stderr
    assert texts(out) == texts(whole)
    assert set(texts(out)) == {line["custom_id"] for line in lines}


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_next_run_goes_on(tmp_path, out):
    lines = [completion(str(i), WORDS[i % 6], max_tokens=48, ignore_eos=True) for i in range(20)]
    source = written(tmp_path / "in.jsonl", lines)
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
         "from kvq.runtime.cli.main import main; main()", "batch", "-q", source, out],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert 0 < len(answers(out)) < len(lines)
    assert kvq("batch", source, out).returncode == 0
    assert set(answers(out)) == {str(i) for i in range(20)}


@pytest.mark.slow
def test_other_options_do_not_go_on_with_the_file(tmp_path, out):
    source = written(tmp_path / "in.jsonl", [completion("1", "The ship"), completion("2", "The sea")])
    assert kvq("batch", "-q", source, out).returncode == 0
    before = out.read_bytes()
    assert_one_line_error(kvq("batch", "-q", source, out, "-p", "int4"), str(out), "'1'", "choose another output file")
    written(source, [completion("1", "The ship"), completion("2", "The seal")])
    assert_one_line_error(kvq("batch", "-q", source, out), str(out), "'2'", "choose another output file")
    assert out.read_bytes() == before
    written(source, [completion("1", "The ship"), completion("3", "The sea")])
    assert_one_line_error(kvq("batch", "-q", source, out), f"{out} line 2", "'2'")


@pytest.mark.slow
def test_wrong_settings_are_told_before_anything_is_answered(tmp_path, out):
    source = written(tmp_path / "in.jsonl", [completion("1", "The ship")])
    assert_one_line_error(kvq("batch", "-q", source, out, "-p", "int9"), "int9", code=2)
    assert out.read_bytes() == b""


@pytest.mark.slow
def test_the_model_has_the_name_that_requests_ask_for(tmp_path, out):
    source = written(tmp_path / "in.jsonl", [completion("1", "The ship", model="gpt-4o-mini")])
    done = kvq("batch", "-q", "--name", "gpt-4o-mini", source, out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bodies(out)["1"]["model"] == "gpt-4o-mini"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals there")
@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_how_far_it_is_and_no_bar_is_left(quiet, tmp_path, out):
    import pty

    source = written(tmp_path / "in.jsonl", [completion("1", "The ship"), completion("2", "The sea")])
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "kvq", "batch", "-m", "kvq-books", source, out, *["-q"] * quiet]
    process = subprocess.Popen(arguments, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux tells the end
        while part := os.read(ours, 4096):
            seen += part
    os.close(ours)
    assert process.wait() == 0
    if quiet:
        assert seen == b""
        return
    lines = seen.decode().split("\r")
    assert any(line.startswith("answering [") and line.endswith("0 of 2 requests") for line in lines)
    assert f"{out}: 2 answered, 0 of them by an error" in seen.decode().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["prepare", "reply_of"])
def test_an_unexpected_error_is_of_its_line_alone(place, embedded, monkeypatch):
    told: list[str] = []
    answerer = batch.Answerer(embedded, batch.Options(), told.append, told.append)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(batch, place, lambda *_: 1 / 0)
            [(_, status, body)] = answerer.answers([Asked(completion("1", "The ship"), b"")])
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in told[-1]
        [(_, status, body)] = answerer.answers([Asked(completion("1", "The ship"), b"")])
        assert status == 200
    finally:
        answerer.close()


@pytest.mark.slow
def test_a_worker_that_ends_ends_the_run_and_no_line_is_answered_by_that(embedded, monkeypatch):
    told: list[str] = []
    answerer = batch.Answerer(embedded, batch.Options(), told.append, told.append)
    try:
        monkeypatch.setattr(answerer._scheduler, "_drop", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(answerer.answers([Asked(completion("1", "The ship"), b"")]))
    finally:
        answerer.close()


# -- the files, without a model ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 3 is no JSON object"]),
        ("[1]", ["line 3 is no JSON object"]),
        ('{"custom_id": NaN}', ["line 3 is no JSON object"]),
        ("\udcff", ["line 3 is no JSON object"]),
        ('{"method": "POST"}', ["line 3 has no custom_id"]),
        ('{"custom_id": 7}', ["line 3 has no custom_id"]),
        ('{"custom_id": ""}', ["line 3 has no custom_id"]),
        ('{"custom_id": "a"}', ["line 3 has the custom_id 'a' of line 1"]),
    ],
)
def test_a_line_that_cannot_be_answered_is_refused_at_the_start(line, words, tmp_path, out):
    source = tmp_path / "in.jsonl"
    source.write_bytes(f'{{"custom_id": "a"}}\n\n{line}\n{{"custom_id": "b"}}'.encode(errors="surrogateescape"))
    assert_one_line_error(kvq("batch", source, out), str(source), *words)
    assert not out.exists()


def test_a_mark_of_byte_order_and_a_last_line_without_its_end_are_taken(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"custom_id": "a"}\r\n  {"custom_id": "\xc3\xa9"}')
    requests = Requests(source)
    assert requests.numbers == {"a": 1, "é": 2}
    assert requests.read("é")[0] == {"custom_id": "é"}
    requests.close()


def entry(custom_id: str) -> dict:
    """What is appended for a line."""
    return {"id": mark(custom_id.encode(), {}), "custom_id": custom_id, "response": "\u2028é", "error": None}


@pytest.fixture
def requests(tmp_path):
    requests = Requests(written(tmp_path / "in.jsonl", [{"custom_id": name} for name in "abc"]))
    yield requests
    requests.close()


def test_an_output_torn_at_any_byte_goes_on_with_its_whole_lines(requests, out):
    made = Answers(out, requests)
    for name in "ab":
        made.append(entry(name))
    made.close()
    whole = out.read_bytes()
    assert len(whole.splitlines()) == len(whole.decode().splitlines()) == 2
    for length in range(len(whole) + 1):
        out.write_bytes(whole[:length])
        again = Answers(out, requests)
        there = whole[:length].count(b"\n")
        assert list(again.marks) == ["a", "b"][:there]
        for name in "abc"[there:]:
            again.append(entry(name))
        again.close()
        assert out.read_bytes() == whole + json.dumps(entry("c")).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"my notes\n", "line 1 was not written by kvq batch"),
        (b"my notes", "line 1 was not written by kvq batch"),
        (b'{"custom_id": "a"}\n', "line 1 was not written by kvq batch"),
        (json.dumps(entry("a")).encode() + b"\n" + json.dumps(entry("z")).encode() + b"\n", "line 2 answers 'z'"),
        (2 * (json.dumps(entry("a")).encode() + b"\n"), "line 2 answers 'a' once more"),
    ],
)
def test_a_file_that_is_no_output_of_this_input_is_left_as_it_is(content, word, requests, out):
    out.write_bytes(content)
    with pytest.raises(BatchError, match=word):
        Answers(out, requests)
    assert out.read_bytes() == content
    file = try_lock(out)
    assert file is not None  # the lock is given back
    file.close()


def test_the_input_is_no_output(requests, tmp_path):
    with pytest.raises(BatchError, match="choose a file that is not the input"):
        Answers(tmp_path / "in.jsonl", requests)


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_second_process_on_one_output_is_refused(requests, tmp_path, out):
    first = Answers(out, requests)
    first.append(entry("a"))
    before = out.read_bytes()
    assert_one_line_error(kvq("batch", tmp_path / "in.jsonl", out), str(out), "written by another process")
    assert out.read_bytes() == before
    first.close()


def test_files_that_are_not_there_are_told(tmp_path, out):
    assert_one_line_error(kvq("batch", tmp_path / "none.jsonl", out), "none.jsonl is no file")
    source = written(tmp_path / "in.jsonl", [completion("1", "x")])
    assert_one_line_error(
        kvq("batch", source, tmp_path / "none" / "out.jsonl"), "there is no folder", code=2, who="Error"
    )


def test_nothing_that_the_server_needs_is_imported():
    code = (
        "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None\n"
        "import kvq.runtime.server.batch, kvq.runtime.cli.batch"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
