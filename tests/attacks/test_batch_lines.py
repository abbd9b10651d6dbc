"""Lines of ``kvq batch`` from a stranger: each has an answer, an error where it asks for harm; none ends the run."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import pytest

from kvq.runtime.errors import BatchError
from kvq.runtime.server.batch import Answerer, Options, answer_file
from kvq.runtime.server.batchfiles import Requests
from tests.tools.packages import needs
from tests.tools.work import SOME, bounded_work

needs("llguidance")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI, HUGE = [{"role": "user", "content": "hi"}], 10**400


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def chat(**body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": CHAT, "body": {"messages": HI, "max_tokens": 3, **body}}


def text(**body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": TEXT, "body": {"prompt": "hello", "max_tokens": 3, **body}}


def said(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content, **more}])


def schema(found: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": found}})


# What is refused: field of a chat -> values of it.
FIELDS: dict[str, list[Any]] = {
    "messages": [None, [], {}, "x", [1], [None], [{}], [{"role": "user"}], HI * 5000],
    "max_tokens": [0, -2, True, "3", [], 1.5],
    "temperature": [-1, HUGE, "x", True, 1e300],
    "top_p": [0, -1, 2, "x"],
    "top_k": [1.5, "x"],
    "seed": [1.5, "x", True],
    "n": [0, -1, 10**9, 129, True],
    "stop": [["a"] * 10_000, [1], "\ud800", 5],
    "logprobs": [5, "x", -1],
    "top_logprobs": [21, -1, 10**9],
    "logit_bias": [{"a": 1}, {"1": HUGE}, {"-1": 1}, {"99999999999": 1}, {"1": "x"}, {"1": 1e308}, [],
                   {str(i): 1 for i in range(50_000)}],
    "response_format": [{"type": "json_schema"}, {"type": "x"}, "x", 7],
    "tools": [[1], [{"type": "function"}], [{"type": "function", "function": {"name": "a" * 10_000}}], "x",
              [{"type": "function", "function": {"name": f"f{i}"}} for i in range(5000)]],
    "tool_choice": ["required", "x", {"type": "function", "function": {"name": "zz"}}],
    "stream": [True, "x"],
    "model": ["../../etc/passwd", "\ud800", "x" * 1_000_000, 7],
    "kv_bits": [0, -1, 1e-9, HUGE, "x", True],
    "kv_memory": [0, 1e-9, HUGE, "x"],
    "policy": ["zzz", "__class__", "x" * 100_000, 7],
    "recent": [-1, True],
    "sink": [-1, HUGE],
    "chat_template_kwargs": [deep(100), "x"],
    "repetition_penalty": [0, -1, "x"],
    "frequency_penalty": [HUGE, "x"],
    "min_p": [-1, 2],
    "\ud800": [1],
    "x" * 100_000: [1],
}  # fmt: skip
LINES: dict[str, dict[str, Any]] = {
    f"{field[:20]!r} {number}": chat(**{field: value})
    for field, values in FIELDS.items()
    for number, value in enumerate(values)
} | {
    "a message of a number": said(5),
    "an unknown role": said("a", "root"),
    "a message of half a surrogate": said("\ud800"),
    "a message of three megabytes": said("x" * 3_000_000),
    "a message of lists in lists": said(json.loads("[" * 500 + "]" * 500)),
    "a picture": said([{"type": "image_url", "image_url": "x"}]),
    "calls that are none": said("a", "assistant", tool_calls=[1]),
    "a schema that is itself": schema({"$ref": "#"}),
    "a schema of the net": schema({"$ref": "http://127.0.0.1:1/x"}),
    "a schema of nothing": schema(False),
    "a schema of 300 levels": schema(deep(300)),
    "a schema of half a surrogate": schema({"const": "\ud800"}),
    "a schema of steps of 1e-300": schema({"type": "number", "multipleOf": 1e-300}),
    "a schema that joins patterns": schema({"allOf": [{"anyOf": [
        {"type": "object", "properties": {f"p{i}": {"pattern": "x*y*"}}} for i in range(20)]}] * 20}),
    "a schema of a pattern that counts": schema({"type": "string", "pattern": "(a+)+$" * 50}),
    **{f"prompt {number}": text(prompt=value) for number, value in enumerate(
        [None, [], [[]], [-1], [10**9], [10**30], [True], [1.5], ["a"] * 10_000, [[1]] * 10_000, "\ud800",
         [1] * 100_000, json.loads("[" * 300 + "]" * 300), {"a": 1}, [["a"]], [[], [1]]])},
    "a text of half a suffix": text(suffix="\ud800"),
    "best of a billion": text(best_of=10**9),
    **{f"frame {number}": chat() | change for number, change in enumerate(
        [{"method": "GET"}, {"method": 7}, {"method": None}, {"method": "x" * 1_000_000}, {"url": "http://evil/"},
         {"url": None}, {"url": ["/v1/completions"]}, {"url": CHAT + "/"}, {"url": "/v1/embeddings"}, {"url": "\ud800"},
         {"body": None}, {"body": []}, {"body": "x"}, {"body": {}}, {"extra": 1}])},
}  # fmt: skip
# custom_ids, all of which are answered.
NAMES = ["\ud800", "x" * 1_000_000, "\x1b[2J\n", "\u2028", "\0", "{}", "\U0001f600"]
# What no line can be told from: refused before anything runs.
FILES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "line 1 is no JSON object"),
    "a list": (b"[]", "line 1 is no JSON object"),
    "a hundred thousand brackets": (b"[" * 100_000, "line 1 is no JSON object"),
    "a number of 5,000 digits": (b'{"custom_id": ' + b"9" * 5000 + b"}", "line 1 is no JSON object"),
    "NaN": (b'{"custom_id": "a", "x": NaN}', "line 1 is no JSON object"),
    "UTF-16": ('{"custom_id": "a"}'.encode("utf-16"), "line 1 is no JSON object"),
    "zeros": (bytes(1_000_000), "line 1 is no JSON object"),
    "no name": (b"{}", "line 1 has no custom_id"),
    "an empty name": (b'{"custom_id": ""}', "line 1 has no custom_id"),
    "a number for a name": (b'{"custom_id": 1}', "line 1 has no custom_id"),
    "null for a name": (b'{"custom_id": null}', "line 1 has no custom_id"),
    "one name twice": (b'{"custom_id": "a"}\n{"custom_id": "a"}', "line 2 has the custom_id 'a' of line 1"),
    "a name that moves the cursor, twice": (b'{"custom_id": "\\u001b[2J"}\n' * 2, "line 2 has the custom_id"),
    "a name of a megabyte, twice": (b'{"custom_id": "%s"}\n' % (b"x" * 1_000_000) * 2, "line 2 has the custom_id"),
}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 3])
def test_every_line_has_its_answer_and_the_next_one_too(tiny_model, tmp_path, monkeypatch, parallel):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # no place where others leave files, which would be logged
    lines = {name: line | {"custom_id": name} for name, line in LINES.items()}
    lines |= {name: chat() | {"custom_id": name} for name in [*NAMES, "the last one"]}
    source, target, told = tmp_path / "in.jsonl", tmp_path / "out.jsonl", []
    source.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    options = Options(parallel=parallel, max_tokens=8)

    def progress(done, total):
        assert done <= total == len(lines)

    class Timed(Answerer):
        """Bounds the work before a line is in the queue, or refused."""

        def _begin(self, asked):
            with bounded_work():
                return super()._begin(asked)

    with bounded_work(len(lines) * SOME):
        done = answer_file(
            source, target, lambda: Timed(tiny_model, options, told.append, told.append), options, progress
        )
    found = [json.loads(line) for line in target.read_text().splitlines()]
    answers = {each["custom_id"]: each["response"] for each in found}
    assert not told  # whatever is logged is a fault of ours
    assert done.answered == len(found) == len(answers) == len(lines)
    assert answers.keys() == lines.keys()
    assert [name for name in LINES if not 400 <= answers[name]["status_code"] < 500] == []
    for name in LINES:
        message = answers[name]["body"]["error"]["message"]
        assert message.isprintable(), name
        assert len(message) < 800, name
    assert all(answers[name]["status_code"] == 200 for name in [*NAMES, "the last one"])


@pytest.mark.parametrize("name", FILES)
def test_a_file_whose_lines_cannot_be_told_apart_is_refused_before_anything_runs(tmp_path, name):
    content, words = FILES[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with bounded_work(), pytest.raises(BatchError) as caught:
        Requests(path)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400 + len(str(path))
