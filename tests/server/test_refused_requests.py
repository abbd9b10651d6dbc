"""Requests that would be misunderstood, bodies that are none, and what a web page could send: refused by name."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest

from tests.tools.serving import JSON, QUESTION
from tests.tools.work import SOME, bounded_work


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temprature": 1}, "unknown field 'temprature'"),
        ({"n": True}, "n must be an integer"),
        ({"n": 0}, "n must be an integer"),
        ({"n": 17}, "at most 16"),
        ({"n": 16, "prompt": ["x"] * 9}, "128 at most"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"n": 2, "best_of": 3}, "best_of is not supported"),
        ({"echo": 1}, "echo must be true or false"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"logit_bias": {"five": 10}}, "strings of digits"),
        ({"logit_bias": {"\u0665": 10}}, "strings of digits"),
        ({"logit_bias": {"5": 101}}, "from -100 to 100"),
        ({"logit_bias": {"5": "x"}}, "numbers from -100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias must be of ids"),
        ({"logit_bias": [5]}, "logit_bias must be an object"),
        ({"presence_penalty": 1000}, "presence_penalty must be"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids must be a list"),
        ({"stop_token_ids": [99999]}, "stop_token_ids must be of ids"),
        ({"response_format": {"type": "yaml"}}, "response_format.type must be"),
        ({"response_format": {"type": "json_schema"}}, "is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"guided_regex": "("}, "cannot be held to"),
        ({"guided_json": "{"}, "not JSON"),
        ({"guided_choice": []}, "guided_choice: choice must be"),
        ({"guided_json": {}, "guided_regex": "a"}, "exclude each other"),
        ({"structured_outputs": {"yaml": "x"}}, "structured_outputs.yaml"),
        ({"max_tokens": 0}, "max_tokens must be an integer"),
        ({"max_tokens": -2}, "max_tokens must be an integer"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_p": -(10**400)}, "top_p must be a number"),
        ({"repetition_penalty": 10**350}, "repetition_penalty must be a number"),
        ({"kv_bits": 10**400}, "kv_bits must be a number"),
        ({"kv_bits": 1e299}, "kv_bits must be a positive number"),
        ({"kv_bits": True}, "kv_bits must be a number"),
        ({"kv_bits": -1}, "kv_bits must be a positive number"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"logprobs": True}, "logprobs must be an integer"),
        ({"policy": "x" * 100_000}, "unknown policy 'xxxx"),
        ({"policy": "\x1b[2J\n\u202e"}, "unknown policy"),
        ({"policy": "policy"}, "unknown policy"),
        ({"prompt": [True, False]}, "prompt"),
        ({"prompt": [1, 1.5]}, "prompt"),
        ({"prompt": [[[[1]]]]}, "prompt must be"),
        ({"stop": "\ud800"}, "stop must be"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stop": [""]}, "none of them empty"),
        ({"logprobs": 21}, "at most 20"),
        ({"stream_options": {"include_usage": True}}, "only for stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"policy": "nonsense"}, "unknown policy 'nonsense'"),
        ({"policy": "int4", "kv_bits": 3}, "cannot follow a budget"),
        ({"kv_bits": 0.1}, "below what is possible"),
        ({"prompt": ""}, "non-empty string"),
        ({"prompt": ["a", ""]}, "prompt must be"),
        ({"prompt": ["a"] * 65}, "at most 64 prompts"),
        ({"prompt": ["a", [99999]]}, "token ids must be"),
        ({"prompt": [1, 99999]}, "token ids must be"),
        ({"prompt": [10**30]}, "token ids must be"),
        ({"prompt": "\ud800"}, "text or token ids"),
        ({"\ud800": 1}, "unknown field"),
        ({"prompt": "word " * 5000}, "at most 2048"),
        ({"model": 5}, "model must be a string"),
    ],
    ids=str,
)
def test_a_completion_request_that_would_be_misunderstood_is_refused_by_name(server, change, words):
    answer = server.post("/v1/completions", content=json.dumps({"prompt": "Hello"} | change), headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["message"].isprintable()
    assert len(answer.content) < 1000
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "non-empty list"),
        ({"messages": ["x"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text parts only"),
        ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "function.name"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "at most 4096 messages"),
        ({"tools": [{"type": "function"}]}, "tools[0].function must be"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type must be"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a"}}] * 2}, "different names"),
        ({"tools": [{"function": {"name": "a"}}] * 129}, "at most 128"),
        ({"tools": [{"function": {"name": "a", "description": "x" * 300_000}}]}, "characters"),
        ({"tools": [{"function": {"name": "a", "parameters": 5}}]}, "parameters must be"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [{"function": {"name": "a"}}], "tool_choice": {"function": {"name": "b"}}}, "not among tools"),
        ({"tools": [{"function": {"name": "a"}}], "tool_choice": 5}, "tool_choice must be"),
        ({"tools": [{"function": {"name": "a"}}], "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"tools": [{"function": {"name": "a", "parameters": {"not": {}}}}], "tool_choice": "required"}, "not"),
        ({"tools": [{"function": {"name": "a", "description": "\ud800"}}]}, "surrogates"),
        ({"chat_template_kwargs": {"x": "\ud800"}}, "surrogates"),
        ({"chat_template_kwargs": {"x": json.loads("[" * 200 + "]" * 200)}}, "nest at most"),
        ({"functions": [{"name": "a"}]}, "functions is not supported"),
        ({"echo": True}, "echo is for completions"),
        ({"continue_final_message": True}, "needs a last message"),
        ({"chat_template_kwargs": {"messages": []}}, "cannot have 'messages'"),
        ({"top_logprobs": 3}, "needs logprobs=true"),
        ({"logprobs": 3}, "logprobs must be true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"prompt": "x"}, "unknown field 'prompt'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}, "surrogates"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ],
    ids=str,
)
def test_a_chat_request_that_would_be_misunderstood_is_refused_by_name(server, change, words):
    body = json.dumps({"messages": QUESTION} | change)
    answer = server.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"\xff", 400, "not JSON"),
        (b'{"temperature": NaN}', 400, "not a JSON number"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"temperature": 1e400, "prompt": "x"}', 400, "more than a number can be"),
        (b'{"temperature": -1e999, "prompt": "x"}', 400, "more than a number can be"),
        (b'{"kv_bits": 1e400, "prompt": "x"}', 400, "more than a number can be"),
        (b'{"prompt": "x", "temperature": Infinity}', 400, "not a JSON number"),
        (b'{"a":' * 100_000, 400, "not JSON"),
        (b'{"prompt": "x", "metadata": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "nests deeper than 256"),
        (b'"' + b"x" * 100_000 + b'"', 400, "must be a JSON object"),
        (b"\xef\xbb\xbf{}", 400, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b" " * 4_000_001, 413, "larger than"),
    ],
    ids=[
        "cut",
        "list",
        "bytes",
        "nan",
        "deep",
        "infinity by a power",
        "minus infinity",
        "infinite bits",
        "infinity",
        "deep objects",
        "deep labels",
        "text",
        "byte order mark",
        "long number",
        "large",
    ],
)
def test_bodies_that_are_none(server, body, status, words):
    answer = server.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


DEEP = "[" * 255 + "]" * 255


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        '"metadata": {"a": "\\ud800"}',
        '"metadata": {"\\udfff": "a"}',
        '"text": {"format": {"type": "text", "name": "\\ud800"}}',
        '"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name":"f","x": "\\ud800"}',
        '"metadata": {"a": 1e400}',
        '"tools": [{"type": "function", "name": "f", "strict": 1e400}]',
        f'"metadata": {{"a": {DEEP}}}',
        f'"text": {{"format": {{"type": "text", "name": {DEEP}}}}}',
    ],
)
def test_what_a_response_repeats_can_be_said(server, fields, stream):
    """A field that is echoed is refused before, not found out when it is written."""
    body = f'{{"input": "hi", "max_output_tokens": 1, "stream": {str(stream).lower()}, {fields}}}'
    answer = server.post("/v1/responses", content=body.encode(), headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_what_nests_as_deep_as_is_taken_comes_back(server):
    nested = "[" * 250 + "]" * 250
    body = f'{{"input": "hi", "max_output_tokens": 1, "metadata": {{"a": {nested}}}}}'
    answer = server.post("/v1/responses", content=body.encode(), headers=JSON)
    assert answer.status_code == 200
    assert server.get(f"/v1/responses/{answer.json()['id']}").json()["metadata"] == answer.json()["metadata"]


def test_a_body_without_length_is_bounded_too(server):
    answer = server.post("/v1/completions", content=(b" " * 10**6 for _ in range(5)), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_requests_that_a_web_page_could_send_unasked_are_refused(server):
    answer = server.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for header in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "same-site"}):
        assert server.post("/v1/completions", content=b'{"prompt": "x"}', headers=header).status_code == 415
    for headers in ({"sec-fetch-site": "cross-site"}, JSON | {"sec-fetch-site": "cross-site"}):
        assert server.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers).status_code == 403
    answer = server.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}')  # no kind, and no page's
    assert answer.status_code == 200
    answer = server.get("/v1/models", headers={"host": "evil.example:80"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    answer = server.get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(server.url + "/v1/completions", headers=preflight).status_code == 405


def test_paths_and_methods(server):
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert server.post("/v1/moderations", {}).json()["error"]["type"] == "not_found_error"
    assert "of ollama's API there are /api/chat, " in server.post("/api/pull", {}).json()["error"]


def test_a_wrong_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'kvq-books'"):
        client.completions.create(model="gpt", prompt="x")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("text", ["word ", "a", " .", "é漢"], ids=repr)
def test_a_text_far_too_long_is_refused_before_it_is_tokenized(server, path, text):
    """Four megabytes take half a minute to tokenize; what the context holds of them takes none."""
    long = text * (1_900_000 // len(text.encode()))
    body = {"prompt": long} if path == "/v1/completions" else {"messages": [{"role": "user", "content": long}]}
    with bounded_work(SOME, time.monotonic):
        answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_an_unexpected_error_has_the_apis_form_and_tells_nothing(embedded):
    """Whatever a fault of ours raises, on the way to the model or behind it."""
    import asyncio

    from kvq.runtime.server.app import Api, make_app
    from kvq.runtime.server.guard import Guard
    from kvq.runtime.server.preparing import Limits
    from kvq.runtime.server.protocol import Settings

    class Broken:
        def ready(self):
            raise ZeroDivisionError("secret /home/somebody")

    logged: list[str] = []
    app = Guard(make_app(Api(Broken(), None, Settings(), Limits())), None, logged.append, None)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as asking:
            return [await asking.get("/health"), await asking.post("/v1/completions", json={"prompt": "x"})]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
    assert all("ZeroDivisionError" in entry for entry in logged)
    assert logged


def test_line_ends_of_other_alphabets_do_not_split_an_event():
    from kvq.runtime.server.responses import sse

    text = "a\u2028b\u2029c\x85d\ne"
    event = sse({"text": text})
    assert len(event.decode().splitlines()) == 2  # the event, and the empty line behind it
    assert json.loads(event.removeprefix(b"data: ")) == {"text": text}
