"""`kvq serve` as clients meet it: a real process on loopback, the official openai client, plain HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import math
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

import kvq
from kvq.runtime.server.capacity import Capacity
from tests.tools.serving import served

LONG = (
    "The harbour lay in the first light of a grey morning, and the boats that had gone out in the night were coming"
    " home one after another, heavy and slow. On the quay the women were waiting with their baskets. Nobody spoke much."
    " The captain of the largest boat stood at the rail and counted the houses on the hill, as he did every time. "
)
QUESTION = [{"role": "user", "content": "Where is the captain?"}]


@pytest.fixture(scope="module")
def model():
    return kvq.load()


@pytest.fixture(scope="module")
def server():
    with served("--max-tokens", "1500", "--concurrency", "4", "--queue", "8") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def library(model, prompt, policy=None, **options):
    """The text that the library alone generates."""
    return "".join(r.text for r in model.session(policy).generate(prompt, **options))


# -- completions ----------------------------------------------------------------------------------


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == "kvq-books"
    assert client.models.retrieve("kvq-books").id == "kvq-books"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_a_completion_is_what_the_library_generates(client, model):
    done = client.completions.create(model="kvq-books", prompt=LONG, max_tokens=20, temperature=0)
    assert done.choices[0].text == library(model, LONG, max_tokens=20, temperature=0)
    assert done.choices[0].finish_reason == "length"
    assert done.object == "text_completion"
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(model.encode(LONG)), 20)
    assert usage.total_tokens == usage.prompt_tokens + 20


def test_token_ids_as_prompt_and_sixteen_tokens_by_default(client, model):
    ids = model.encode("It was late")
    done = client.completions.create(model="kvq-books", prompt=ids, temperature=0)
    assert done.choices[0].text == library(model, ids, max_tokens=16, temperature=0)


def test_a_stream_carries_the_same_text_and_usage_if_asked_for(client, model):
    options = {"model": "kvq-books", "prompt": LONG, "max_tokens": 20, "seed": 3, "temperature": 0.8}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == library(model, LONG, max_tokens=20, seed=3) == client.completions.create(**options).choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
    assert chunks[-2].kvq["tokens"] == len(model.encode(LONG)) + 19
    plain = list(client.completions.create(**options, stream=True))
    assert all(chunk.choices for chunk in plain)  # what most programs rely on


def test_seeds(client):
    def text(seed):
        return client.completions.create(model="kvq-books", prompt=LONG, max_tokens=24, seed=seed).choices[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(1, 5)}) > 1


def test_stop_strings_end_the_text_and_are_no_part_of_it(client):
    whole = client.completions.create(model="kvq-books", prompt=LONG, max_tokens=40, temperature=0).choices[0].text
    stop = whole[9:12]
    for stops in (stop, [stop, "never to be seen"]):
        done = client.completions.create(model="kvq-books", prompt=LONG, max_tokens=40, temperature=0, stop=stops)
        assert done.choices[0].text == whole[: whole.index(stop)]
        assert done.choices[0].finish_reason == "stop"
    chunks = client.completions.create(
        model="kvq-books", prompt=LONG, max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]


def test_logprobs_of_completions(client, model):
    options = {"model": "kvq-books", "prompt": LONG, "max_tokens": 8, "temperature": 0, "logprobs": 3}
    done = client.completions.create(**options)
    found = done.choices[0].logprobs
    assert "".join(found.tokens) == done.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(8)]
    expected = [r.logprob for r in model.session().generate(LONG, max_tokens=8, temperature=0)]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-5)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == pytest.approx(logprob, abs=1e-5) == max(top.values())  # greedy
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
    chunks = list(client.completions.create(**options, stream=True))
    assert [t for chunk in chunks for t in chunk.choices[0].logprobs.tokens] == found.tokens
    assert [o for chunk in chunks for o in chunk.choices[0].logprobs.text_offset] == found.text_offset


def test_what_ran_is_reported(client):
    done = client.completions.create(model="kvq-books", prompt=LONG * 2, extra_body={"policy": "int4"})
    assert done.kvq["policy"] == "int4"
    held = done.kvq["precisions"]
    assert (held["k16v16"], done.kvq["sink"]) == (4, 4)
    assert held["k16v16"] + held["k4v4"] + held["recent"] == done.kvq["tokens"]
    done = client.completions.create(model="kvq-books", prompt=LONG * 2, extra_body={"kv_bits": 4.5})
    assert done.kvq["policy"] == "adaptive"
    assert 3 < done.kvq["kv_bits"] <= 4.5
    assert done.kvq["kv_nbytes"] > 0


# -- chat -----------------------------------------------------------------------------------------


def test_chat_streams_and_answers_alike(client, model):
    options = {"model": "kvq-books", "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    done = client.chat.completions.create(**options)
    template = model.chat_template
    responses = model.session().generate(
        template.encode(QUESTION), max_tokens=20, temperature=0, stop=template.stop, stop_tokens=template.stop_tokens
    )
    assert done.choices[0].message.content == "".join(r.text for r in responses)
    assert done.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == done.choices[0].message.content
    assert chunks[-1].usage == done.usage


def test_a_message_can_be_sent_back_as_it_came(client):
    first = client.chat.completions.create(model="kvq-books", messages=QUESTION, max_tokens=8)
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]
    messages = [*QUESTION, first.choices[0].message, {"role": "user", "content": parts}]
    assert client.chat.completions.create(model="kvq-books", messages=messages, max_completion_tokens=8).usage


def test_logprobs_of_chat(client):
    done = client.chat.completions.create(
        model="kvq-books", messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    content = done.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == done.choices[0].message.content
    assert all(t.top_logprobs[0].token == t.token and len(t.top_logprobs) == 2 for t in content)
    chunks = client.chat.completions.create(
        model="kvq-books", messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, stream=True
    )
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in content]


def test_a_conversation_is_continued_from_its_cache(client, model):
    """Every turn is what the library says to the whole prompt; what it begins with is not processed again."""
    messages = [{"role": "system", "content": "A long week. " + LONG * 3}]
    reused = 0
    for turn in range(4):
        messages.append({"role": "user", "content": f"What happened on day {turn}?"})
        done = client.chat.completions.create(
            model="kvq-books", messages=messages, max_tokens=30, seed=turn, extra_body={"policy": "int4"}
        )
        ids = model.chat_template.encode(messages)
        expected = library(model, ids, "int4", max_tokens=30, seed=turn, stop=model.chat_template.stop)
        assert done.choices[0].message.content == expected
        assert done.usage.prompt_tokens == len(ids)
        cached = done.usage.prompt_tokens_details.cached_tokens
        assert cached == reused
        reused = (len(ids) - 1) // 128 * 128
        messages.append({"role": "assistant", "content": done.choices[0].message.content})
    assert reused >= 256


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temprature": 1}, "unknown field 'temprature'"),
        ({"n": 2}, "n is not supported"),
        ({"n": True}, "n is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"logit_bias": {"5": 10}}, "logit_bias is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"max_tokens": 0}, "max_tokens must be an integer"),
        ({"max_tokens": 10**9}, "max_tokens is at most 1500"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stop": [""]}, "none of them empty"),
        ({"logprobs": 6}, "at most 5"),
        ({"stream_options": {}}, "only for stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"policy": "nonsense"}, "unknown policy 'nonsense'"),
        ({"policy": "int4", "kv_bits": 3}, "cannot follow a budget"),
        ({"kv_bits": 0.1}, "below what is possible"),
        ({"prompt": ""}, "non-empty string"),
        ({"prompt": ["a", "b"]}, "several prompts"),
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
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "non-empty list"),
        ({"messages": ["x"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text parts only"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"top_logprobs": 3}, "needs logprobs=true"),
        ({"logprobs": 3}, "logprobs must be true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"prompt": "x"}, "unknown field 'prompt'"),
    ],
    ids=str,
)
def test_a_chat_request_that_would_be_misunderstood_is_refused_by_name(server, change, words):
    answer = server.post("/v1/chat/completions", {"messages": QUESTION} | change)
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
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b" " * 4_000_001, 413, "larger than"),
    ],
    ids=["cut", "list", "bytes", "nan", "deep", "long number", "large"],
)
def test_bodies_that_are_none(server, body, status, words):
    answer = server.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_body_without_length_is_bounded_too(server):
    answer = server.post("/v1/completions", content=(b" " * 10**6 for _ in range(5)), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_requests_that_a_web_page_could_send_unasked_are_refused(server):
    answer = server.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    answer = server.get("/v1/models", headers={"host": "evil.example:80"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    answer = server.get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(server.url + "/v1/completions", headers=preflight).status_code == 405


def test_paths_and_methods(server):
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert server.post("/v1/embeddings", {}).json()["error"]["type"] == "not_found_error"


def test_a_wrong_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'kvq-books'"):
        client.completions.create(model="gpt", prompt="x")


# -- clients that go away, clients at the same time -----------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_work_at_once(server, client, stream):
    """The log line of the request says how far it got: nowhere near what was asked for."""
    server.until(active=0, waiting=0)
    lines = len(server.lines)
    body = {"prompt": LONG, "max_tokens": 1500, "stream": stream, "temperature": 1.5}
    if stream:
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
            for _ in zip(range(3), answer.iter_lines(), strict=False):
                pass
    else:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(server.url + "/v1/completions", json=body, timeout=0.05)
    server.until(active=0, waiting=0)
    assert not any("generated 1500" in line for line in server.lines[lines:])
    assert client.completions.create(model="kvq-books", prompt=LONG, max_tokens=3).choices[0].text


def test_a_full_queue_is_told(server):
    """Twelve requests find a place (four at work, eight waiting), the thirteenth is told to come again."""
    server.until(active=0, waiting=0)
    body = {"prompt": LONG, "max_tokens": 100, "temperature": 1.5}
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/completions", body), range(20)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) + sum(answer.status_code == 200 for answer in answers) == 20
    assert refused
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"


def converse(client, model, number, turns=3):
    """A conversation; every text with what the library alone says to the same prompt."""
    pairs = []
    messages = [{"role": "system", "content": f"Story {number}. " + LONG}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn} of {number}?"})
        options = {"max_tokens": 16, "seed": number, "temperature": 0.8}
        stream = client.chat.completions.create(
            model="kvq-books", messages=messages, stream=True, extra_body={"policy": "k8v4"}, **options
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        ids = model.chat_template.encode(messages)
        pairs.append((text, library(model, ids, "k8v4", stop=model.chat_template.stop, **options)))
        messages.append({"role": "assistant", "content": text})
    return pairs


def test_clients_at_once_under_a_bound_that_forces_sessions_to_disk(model, tmp_path):
    limit = 3 * Capacity(model.session("k8v4")).most_nbytes(400)
    arguments = ["--kv-memory-total", str(limit), "--session-dir", tmp_path, "--max-tokens", "16"]
    with served(*arguments) as server:
        client = server.client()
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda number: converse(client, model, number), range(6)))
        for pairs in found:
            for text, expected in pairs:
                assert text == expected
        stats = server.stats()
        assert stats["evictions"] > 0
        assert stats["restores"] > 0
        assert stats["kv_peak_nbytes"] <= limit
        answer = server.post("/v1/completions", {"prompt": "word " * 1500, "policy": "fp16"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "kv_memory_exceeded")
        assert server.end() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_load_measurement_checks_every_text():
    command = [sys.executable, "-m", "kvq.bench.serve", "--seconds", "2", "--clients", "2", "--max-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures, verdict = done.stdout.rsplit("}", 1)
    assert json.loads(figures + "}")["kv_peak_nbytes"] > 0
    assert verdict.strip().startswith("0 of ")


# -- starting and ending --------------------------------------------------------------------------


def test_the_port_answers_while_the_model_loads(tmp_path):
    with served("--session-dir", tmp_path, ready=False) as server:
        codes = []
        while not codes or codes[-1] != 200:
            health = server.get("/health")
            codes.append(health.status_code)
            if health.status_code == 503:
                assert health.json()["status"] == "loading"
                answer = server.post("/v1/completions", {"prompt": "x"})
                if answer.status_code != 200:
                    assert answer.json()["error"]["code"] == "loading"
                    assert answer.headers["retry-after"]
        assert codes[0] == 503
        assert server.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_streams_with_an_error_event_and_the_process_with_0(by, tmp_path):
    with served("--session-dir", tmp_path) as server:
        body = {"prompt": LONG, "max_tokens": 1000, "stream": True, "temperature": 1.5}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines).startswith("data: {")
            server.process.send_signal(by)
            last = list(lines)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.end(by) == 0
        assert not any("Traceback" in line for line in server.lines)
        assert server.process.stdout.read() == ""
    assert list(tmp_path.iterdir()) == []


def test_key_origin_and_log():
    secret = "a secret the log must not have"
    with served("--cors-origin", "http://app.example", "--max-body", "10kB", env={"KVQ_API_KEY": "k-1"}) as server:
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client("k-2").models.list()
        assert refused.value.code == "invalid_api_key"
        assert server.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert server.get("/health").status_code == 200
        assert server.client("k-1").models.list().data
        assert server.client("k-1").completions.create(model="kvq-books", prompt=secret, max_tokens=2)
        preflight = {"origin": "http://app.example", "access-control-request-method": "POST"}
        answer = httpx.options(server.url + "/v1/completions", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://app.example")
        assert server.get("/%0Akvq: forged?x=" + secret.replace(" ", "+")).status_code == 401
        assert server.end() == 0
        log = "\n".join(server.lines)
        assert "POST /v1/completions 200" in log
        for hidden in (secret, "k-1", "k-2", "forged"):
            assert hidden not in log.replace("%0Akvq:%20forged", "")


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kvq", "serve", *arguments], capture_output=True, text=True, timeout=120
    )


def test_what_keeps_a_server_from_starting_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kvq: cannot listen on 127.0.0.1")
    assert done.stderr.count("\n") == 1
    for arguments, words, code in (
        (["-m", "nothing-here"], "no model 'nothing-here'", 1),
        (["-p", "nonsense"], "unknown policy", 2),
        (["--kv-memory-total", "1kB"], "may take", 1),
        (["--kv-memory-total", "lots"], "is not a size", 2),
        (["--queue", "-1"], "Invalid value", 2),
        (["--api-key", ""], "not empty", 2),
    ):
        done = command("--port", "0", *arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_warning_where_others_can_reach_it_without_a_key():
    with served("--host", "0.0.0.0", ready=False) as server:
        assert any("without a key" in line for line in server.lines)
        server.process.kill()


def test_a_request_has_its_time():
    with served("--timeout", "0.5", "--max-tokens", "2000") as server:
        begun = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": LONG, "max_tokens": 1500, "temperature": 1.5})
        if answer.status_code != 200:  # a fast machine is done in time
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
        assert time.monotonic() - begun < 120
