"""A full context makes room over HTTP: field and start option, chats and texts, streams, several texts at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.tools.serving import library, served

pytestmark = pytest.mark.slow
PROMPT = "The ship left the harbour in the morning. " * 4
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def shifting(tiny_bundle):
    """A server of the tiny model, which goes on unless a request says otherwise."""
    with served("-m", tiny_bundle, "--name", "tiny", "--context-shift") as server:
        yield server


def complete(server, **fields):
    answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 200, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_texts_are_the_library_s_several_in_one_pass_and_streamed(shifting, tiny_model):
    expected = library(tiny_model, PROMPT, max_tokens=200, context_shift=True, **GREEDY)
    with ThreadPoolExecutor(3) as pool:
        drawn = pool.submit(complete, shifting, n=2, temperature=1.1, seed=5)
        greedy = pool.submit(complete, shifting, kv_token_bits=True)
        stream = shifting.client().completions.create(
            model="tiny", prompt=PROMPT, max_tokens=200, temperature=0.0, stream=True, extra_body={"ignore_eos": True}
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
    found, both = greedy.result(), drawn.result()
    assert found["choices"][0]["text"] == expected
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 200
    told = found["kvq"]
    assert told["finish_reason"] == "length"
    assert told["context_shifts"] >= 1
    assert told["shifted_tokens"] + told["tokens"] == found["usage"]["prompt_tokens"] + 199
    assert sum(cell[1] for cell in told["cache"]["cells"]) == told["cache"]["tokens"] == told["tokens"]
    for number, choice in enumerate(both["choices"]):
        options = {**GREEDY, "temperature": 1.1, "seed": 5 + number}
        assert choice["text"] == library(tiny_model, PROMPT, max_tokens=200, context_shift=True, **options)


def test_a_request_that_wants_none_of_it_ends_where_the_context_does(shifting):
    found = complete(shifting, context_shift=False)
    assert (found["choices"][0]["finish_reason"], found["kvq"]["finish_reason"]) == ("length", "context")
    assert found["usage"]["completion_tokens"] == 256 - found["usage"]["prompt_tokens"] + 1
    assert found["kvq"]["context_shifts"] == 0
    refused = shifting.post("/v1/completions", {"prompt": "x", "context_shift": "yes"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "context_shift")


def test_a_chat_loses_its_oldest_turns_even_those_of_the_prompt(shifting, tiny_model):
    system = {"role": "system", "content": "Be brief."}
    history = [
        {"role": role, "content": f"{role} number {n} speaks"} for n in range(12) for role in ("user", "assistant")
    ]
    messages = [system, *history, {"role": "user", "content": "And now?"}]
    body = {"messages": messages, "max_tokens": 60, **GREEDY}
    assert shifting.post("/v1/chat/completions", {**body, "context_shift": False}).status_code == 400
    answer = shifting.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    expected = "".join(
        response.text
        for response in tiny_model.generate(messages, max_tokens=60, policy="int8", context_shift=True, **GREEDY)
    )
    assert found["choices"][0]["message"]["content"] == expected
    assert found["usage"]["prompt_tokens"] <= 128
    assert found["kvq"]["context_shifts"] == 1
    ollama = shifting.post("/api/chat", {"model": "tiny", "messages": messages, "stream": False, "shift": False})
    assert ollama.status_code == 400
