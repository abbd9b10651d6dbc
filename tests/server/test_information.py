"""What can be asked without generating: tokens of texts, counts, properties."""

from __future__ import annotations

import re

import pytest

from tests.tools.serving import JSON, LONG, QUESTION


def test_tokens_and_back(server, model):
    text = "The captain said: “é日😀”.\n"
    ids = model.encode(text, beginning=False)
    found = server.post("/tokenize", {"content": text}).json()
    assert found["tokens"] == ids
    assert server.post("/v1/detokenize", {"tokens": ids}).json()["content"] == text
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == model.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    assert len(found["token_strs"]) == found["count"]
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    found = server.post("/tokenize", {"messages": QUESTION}).json()
    assert found["tokens"] == model.chat_template.encode(QUESTION)
    assert server.post("/tokenize", {"content": LONG * 60}).json()["count"] > 2048  # more than the context holds
    assert server.post("/tokenize", {"content": ""}).json()["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", "{}", "give one of"),
        ("/tokenize", '{"content": "a", "prompt": "b"}', "give one of"),
        ("/tokenize", '{"content": 5}', "must be a string"),
        ("/tokenize", '{"content": "\\ud800"}', "surrogates"),
        ("/tokenize", '{"content": "a", "zzz": 1}', "unknown field"),
        ("/detokenize", '{"tokens": [99999]}', "tokens must be"),
        ("/detokenize", '{"tokens": [true]}', "tokens must be"),
        ("/detokenize", '{"tokens": "x"}', "tokens must be"),
    ],
)
def test_what_is_no_text_and_no_tokens_is_refused(server, path, body, words):
    answer = server.post(path, content=body, headers=JSON)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_text_without_end_is_not_tokenized(server):
    answer = server.post("/tokenize", {"content": "word " * 700_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def samples(text: str) -> dict[str, float]:
    """Name with labels -> value, of Prometheus' text format."""
    rows = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+', row) for row in rows)
    return {name: float(value) for name, value in (row.rsplit(" ", 1) for row in rows)}


def test_metrics_count_what_happens(server, client, model):
    before = samples(server.get("/metrics").text)
    done = client.completions.create(model="kvq-books", prompt=LONG, max_tokens=7, n=2)
    server.get("/made/up/by/a/client")
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = samples(answer.text)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("kvq_prompt_tokens_total") == len(model.encode(LONG))
    assert more("kvq_generated_tokens_total") == done.usage.completion_tokens == more("kvq_token_seconds_count") + 2
    assert more("kvq_first_token_seconds_count") == 1
    assert more("kvq_bits_count") == more("kvq_request_seconds_count") == 2
    assert more('kvq_requests_total{path="/v1/completions",status="200"}') == 1
    assert more('kvq_requests_total{path="other",status="404"}') == 1
    assert "made" not in answer.text


def test_metrics_count_drafts(server, client):
    before = samples(server.get("/metrics").text)
    for _ in range(2):  # the second goes on in a session that has drafted before
        client.completions.create(model="kvq-books", prompt="It was so. " * 30, max_tokens=40, temperature=0)
    after = samples(server.get("/metrics").text)
    drafted, accepted = (
        after[name] - before[name] for name in ("kvq_drafted_tokens_total", "kvq_accepted_tokens_total")
    )
    assert 0 < accepted <= drafted
    assert accepted < 2 * 40
    assert after["kvq_kv_nbytes"] > 0
    assert after['kvq_bits_bucket{le="+Inf"}'] == after["kvq_bits_count"]


def test_properties_and_version(server, model):
    found = server.get("/props").json()
    assert found["default_generation_settings"]["n_ctx"] == 2048
    assert found["total_slots"] == 4
    assert found["chat_template"] == model.chat_template.source
    assert str(model.path) not in server.get("/props").text
    assert server.get("/api/version").json() == server.get("/version").json()
    assert server.get("/").status_code == 200
