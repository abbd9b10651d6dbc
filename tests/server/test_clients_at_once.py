"""Clients that go away and clients at the same time: work is freed, a full queue told, memory kept to its bound."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys

import httpx
import pytest

import kvq
from kvq.bench.alone import run_alone
from kvq.bench.serve import wrong_texts
from kvq.bench.talk import Load, talks
from kvq.runtime.server.capacity import Capacity
from tests.tools.serving import LONG, library, served


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_load_measurement_checks_every_text():
    command = [sys.executable, "-m", "kvq.bench.serve", "--seconds", "2", "--clients", "2", "--max-tokens", "8"]
    done = subprocess.run([*command, "--alone", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures, verdict = done.stdout.rsplit("}", 1)
    both = json.loads(figures + "}")
    assert both["server"]["kv_peak_nbytes"] > 0
    assert all(one["tokens_per_s"] > 0 for one in both.values())
    assert verdict.strip().splitlines()[1].startswith("0 of ")


def test_the_library_alone_has_the_conversations_of_the_clients():
    load = Load(clients=3, seconds=1.5, conversations=2, turns=2, max_tokens=6, policy="int8", chunk=64, seeds=True)
    done, took = run_alone(kvq.load(), load)
    assert took >= load.seconds
    assert all(talk.next().messages in [turn.messages for turn in done] for talk in talks(load))
    fresh = [turn for turn in done if not turn.cached_tokens]  # others' chunks begin where a text went another way
    assert len(fresh) >= load.clients
    assert wrong_texts(fresh, None, load) == 0
