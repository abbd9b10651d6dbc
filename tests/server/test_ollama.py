"""Ollama's API, by its own client: answers beside the library's, streams, schemas, errors in its form."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.tools.packages import needs
from tests.tools.schemas import problems, record
from tests.tools.serving import JSON, QUESTION, library

ollama = needs("ollama")
OPTIONS = {"num_predict": 12, "temperature": 0, "num_ctx": 2048}


@pytest.fixture
def asking(server):
    return ollama.Client(host=server.url)


def answered(model, messages, **options):
    template = model.chat_template
    stops = {"stop": template.stop, "stop_tokens": template.stop_tokens}
    return library(model, template.encode(messages), max_tokens=12, temperature=0, **stops, **options)


def test_a_chat_is_answered_at_once_and_as_a_stream(asking, model):
    expected = answered(model, QUESTION)
    done = asking.chat(model="kvq-books", messages=QUESTION, options=OPTIONS)
    assert done.message.content == expected
    assert done.done
    assert done.prompt_eval_count == len(model.chat_template.encode(QUESTION))
    assert done.eval_count <= 12
    parts = list(asking.chat(model="kvq-books:latest", messages=QUESTION, options=OPTIONS, stream=True))
    assert "".join(part.message.content for part in parts) == expected
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 3
    assert parts[-1].done_reason in ("stop", "length")


def test_a_prompt_is_a_question_or_raw_text(asking, model):
    done = asking.generate(model="kvq-books", prompt="Where is he?", system="Be brief.", options=OPTIONS)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is he?"}]
    assert done.response == answered(model, messages)
    raw = asking.generate(model="kvq-books", prompt="It was late", raw=True, options=OPTIONS)
    assert raw.response == library(model, "It was late", max_tokens=12, temperature=0)
    streamed = asking.generate(model="kvq-books", prompt="It was late", raw=True, options=OPTIONS, stream=True)
    assert "".join(part.response for part in streamed) == raw.response
    assert asking.generate(model="kvq-books", prompt="").done_reason == "load"


def test_a_stream_is_a_line_of_json_at_a_time_and_the_default(server):
    with httpx.stream("POST", server.url + "/api/chat", json={"messages": QUESTION, "options": OPTIONS}) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1]["done"]
    assert {"total_duration", "eval_count", "kvq"} <= lines[-1].keys()
    assert all(line["model"] == "kvq-books" for line in lines)


@pytest.mark.slow
def test_a_format_is_kept_to(asking):
    needs("llguidance")
    schema = record(place={"enum": ["ship", "shore"]}, far={"type": "boolean"})
    options = {"num_predict": 80, "temperature": 1}
    done = asking.chat(model="kvq-books", messages=QUESTION, format=schema, options=options)
    assert problems(schema, done.message.content) == []
    any_object = asking.generate(model="kvq-books", prompt="Where?", format="json", options=options)
    assert any_object.response.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_tokens_is_the_one_they_took(asking, stream):
    """From which clients reckon tokens a second: of a short prompt's answer the tokens take most of the time."""
    options = {"num_predict": 100, "temperature": 1.5, "seed": 3}
    said = asking.generate(model="kvq-books", prompt="It was late", raw=True, options=options, stream=stream)
    done = list(said)[-1] if stream else said
    assert done.eval_count == 100
    assert done.eval_duration > done.total_duration / 4
    assert done.prompt_eval_duration + done.eval_duration == done.total_duration


def test_vectors_are_those_of_the_library(asking, model):
    texts = ["The ship sailed over the sea.", "Nobody spoke."]
    found = asking.embed(model="kvq-books:latest", input=texts)
    for vector, text in zip(found.embeddings, texts, strict=True):
        assert vector == pytest.approx(model.embed(text).tolist(), abs=1e-6)
    assert found.prompt_eval_count == sum(len(model.encode(text)) for text in texts)
    assert asking.embed(model="kvq-books", input=texts[0]).embeddings == found.embeddings[:1]
    assert asking.embeddings(model="kvq-books", prompt=texts[1]).embedding == found.embeddings[1]


@pytest.mark.slow
def test_the_end_of_a_text_too_long_for_a_vector_goes_unless_the_request_says_otherwise(asking, model):
    words = "word " * (model.architecture.context + 100)
    found = asking.embed(model="kvq-books", input=words)
    assert found.prompt_eval_count == model.architecture.context
    with pytest.raises(ollama.ResponseError, match="shorten"):
        asking.embed(model="kvq-books", input=words, truncate=False)


def test_what_there_is(asking):
    (listed,) = asking.list().models
    assert listed.model == "kvq-books"
    assert listed.size > 1_000_000
    assert asking.show("kvq-books").modelinfo["llama.context_length"] == 2048
    assert asking.ps().models[0].model == "kvq-books"


@pytest.mark.parametrize(
    ("path", "change", "status", "words"),
    [
        ("/api/chat", {"model": "other"}, 404, "no model 'other'"),
        ("/api/pull", {}, 404, "/api/embed, /api/embeddings, /api/generate"),
        ("/api/embed", {"input": "a", "dimensions": 8}, 400, "dimensions is not supported"),
        ("/api/embed", {"model": "other", "input": "a"}, 404, "no model 'other'"),
        ("/api/embeddings", {"input": "a"}, 400, "prompt must be"),
        ("/api/chat", {"options": {"temprature": 1}}, 400, "options.temprature"),
        ("/api/chat", {"options": {"mirostat": 2}}, 400, "options.mirostat is not supported"),
        ("/api/chat", {"options": {"num_predict": "x"}}, 400, "num_predict must be"),
        ("/api/chat", {"messages": []}, 400, "non-empty list"),
        ("/api/chat", {"format": "yaml"}, 400, "format"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, 400, "images"),
        ("/api/generate", {"prompt": "x", "messages": None, "zzz": 1}, 400, "unknown field 'zzz'"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
    ],
    ids=str,
)
def test_errors_have_its_form(server, path, change, status, words):
    body = {"messages": QUESTION} if path == "/api/chat" else {}
    answer = server.post(path, content=json.dumps(body | change), headers=JSON)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]


def test_an_error_reaches_the_client_as_its_own(asking):
    with pytest.raises(ollama.ResponseError, match="no model 'x'"):
        asking.chat(model="x", messages=QUESTION)
