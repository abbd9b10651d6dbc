"""Several texts of a request, prompts in lists, and what changes logits: as clients send it, beside the library."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.tools.serving import LONG, QUESTION, library

MODEL = {"model": "kvq-books"}


@pytest.mark.parametrize("stream", [False, True])
def test_n_texts_are_those_of_as_many_seeds(client, model, stream):
    options = {**MODEL, "prompt": LONG, "max_tokens": 12, "seed": 5, "n": 3}
    if stream:
        texts = ["", "", ""]
        for chunk in client.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        done = client.completions.create(**options)
        texts = [choice.text for choice in done.choices]
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        assert done.usage.completion_tokens == 36
        assert done.usage.prompt_tokens == len(model.encode(LONG))
    assert texts == [library(model, LONG, max_tokens=12, seed=seed) for seed in (5, 6, 7)]


def test_n_of_a_chat_and_each_has_its_end(client):
    done = client.chat.completions.create(**MODEL, messages=QUESTION, max_tokens=9, n=4, temperature=1.5)
    assert len(done.choices) == 4
    assert len({choice.message.content for choice in done.choices}) > 1
    assert all(choice.finish_reason in ("stop", "length") for choice in done.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_in_a_list_are_answered_each(client, model, stream):
    prompts = ["It was late", LONG, "The captain"]
    options = {**MODEL, "prompt": prompts, "max_tokens": 6, "temperature": 0, "n": 2}
    if stream:
        texts = [""] * 6
        for chunk in client.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        done = client.completions.create(**options)
        texts = [choice.text for choice in done.choices]
        assert done.usage.prompt_tokens == sum(len(model.encode(prompt)) for prompt in prompts)
    expected = [library(model, prompt, max_tokens=6, temperature=0) for prompt in prompts]
    assert texts == [text for text in expected for _ in range(2)]
    ids = [model.encode(prompt) for prompt in prompts]
    done = client.completions.create(**MODEL, prompt=ids, max_tokens=6, temperature=0)
    assert [choice.text for choice in done.choices] == expected


def reference_logprobs(model, ids):
    logits = model.session().append(ids, all_logits=True).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [5, 400])
def test_a_prompt_that_is_echoed_has_its_log_probabilities(client, model, stream, length):
    """What programs that compare answers by likelihood ask for: more tokens than a chunk, too."""
    ids = (model.encode(LONG) * 6)[:length]
    options = {**MODEL, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
        tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens]
        values = [value for chunk in chunks if chunk.logprobs for value in chunk.logprobs.token_logprobs]
        text = "".join(chunk.text for chunk in chunks)
    else:
        choice = client.completions.create(**options).choices[0]
        tokens, values, text = choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.text
        assert [
            max(top.values()) >= value - 1e-6
            for top, value in zip(choice.logprobs.top_logprobs[1:], values[1:], strict=True)
        ]
        assert choice.logprobs.text_offset == [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert values[0] is None
    assert values[1:] == pytest.approx(reference_logprobs(model, ids), abs=2e-3)
    assert "".join(tokens) == text == model.tokenizer.decode(ids)


def test_an_echo_comes_before_what_is_generated(client, model):
    done = client.completions.create(**MODEL, prompt="It was late", max_tokens=4, temperature=0, echo=True, logprobs=0)
    text = library(model, "It was late", max_tokens=4, temperature=0)
    assert done.choices[0].text == "It was late" + text
    assert "".join(done.choices[0].logprobs.tokens) == "It was late" + text
    plain = client.completions.create(**MODEL, prompt="It was late", max_tokens=4, temperature=0, echo=True)
    assert plain.choices[0].text == "It was late" + text


@pytest.mark.parametrize(
    "options",
    [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0, "temperature": 0.7}, {"frequency_penalty": -1.0}],
    ids=str,
)
def test_penalties_are_the_librarys(client, model, options):
    done = client.completions.create(**MODEL, prompt=LONG, max_tokens=24, seed=3, **options)
    assert done.choices[0].text == library(model, LONG, max_tokens=24, seed=3, **options)
    assert done.choices[0].text != library(model, LONG, max_tokens=24, seed=3)


def test_a_bias_forbids_and_forces(client, model):
    options = {**MODEL, "prompt": LONG, "max_tokens": 6, "temperature": 0}
    first = model.encode(client.completions.create(**options).choices[0].text, beginning=False)[0]
    without = client.completions.create(**options, logit_bias={str(first): -100}, logprobs=0)
    assert without.choices[0].logprobs.tokens[0] != model.tokenizer.decode([first])
    forced = client.completions.create(**options, logit_bias={str(first): 100})
    assert forced.choices[0].text == model.tokenizer.decode([first] * 6)


def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is(client, model):
    done = client.completions.create(
        **MODEL, prompt=LONG, max_tokens=10**9, temperature=1, extra_body={"stop": ["the"]}
    )
    assert done.kvq["max_tokens"] == 1500  # of the server
    ids = (model.encode(LONG) * 30)[:2040]
    done = client.completions.create(**MODEL, prompt=ids, max_tokens=5000, temperature=1)
    assert done.kvq["max_tokens"] == 2048 - 2040 + 1
    assert done.usage.completion_tokens <= 9
    assert (
        client.chat.completions.create(**MODEL, messages=QUESTION, max_tokens=-1, stop=["e"]).choices[0].finish_reason
    )


def test_hints_are_taken_and_change_nothing(client):
    options = {**MODEL, "messages": QUESTION, "max_tokens": 10, "seed": 4}
    hints = {
        "user": "someone", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "reasoning_effort": "low",
        "parallel_tool_calls": True, "verbosity": "low", "safety_identifier": "x", "prompt_cache_key": "y",
        "prediction": {"type": "content", "content": "x"}, "modalities": ["text"], "tools": [], "n": 1, "best_of": 1,
        "response_format": {"type": "text"}, "stream_options": None, "logit_bias": {}, "top_logprobs": None,
    }  # fmt: skip
    plain, hinted = (client.chat.completions.create(**options, extra_body=more) for more in ({}, hints))
    assert plain.choices[0].message.content == hinted.choices[0].message.content
    named = client.chat.completions.create(**{**options, "messages": [{**QUESTION[0], "name": "Bob"}]})
    assert named.choices[0].message.content == plain.choices[0].message.content
    negative = client.chat.completions.create(**{**options, "seed": -1}).choices[0].message.content
    assert negative == client.chat.completions.create(**{**options, "seed": 2**64 - 1}).choices[0].message.content


def test_messages_as_clients_send_them_back(client, model):
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": "And?"},
    ]
    done = client.chat.completions.create(**MODEL, messages=messages, max_tokens=4)
    same = [{"role": "system", "content": "Be brief."}, messages[1], {"role": "assistant", "content": ""}, messages[3]]
    assert done.usage.prompt_tokens == len(model.chat_template.encode(same))


def test_a_last_message_of_the_assistants_goes_on(client, model):
    begun = [*QUESTION, {"role": "assistant", "content": "The captain is on"}]
    template = model.chat_template
    ids = template.encode_begun(begun)
    assert model.tokenizer.decode(ids).endswith("The captain is on")
    expected = library(model, ids, max_tokens=8, temperature=0, stop=template.stop, stop_tokens=template.stop_tokens)
    options = {**MODEL, "messages": begun, "max_tokens": 8, "temperature": 0}
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    anew = client.chat.completions.create(**options, extra_body={"add_generation_prompt": True})
    assert anew.usage.prompt_tokens == len(template.encode(begun))


def test_paths_without_the_prefix(server):
    for path, body in (
        ("/completions", {"prompt": "It"}), ("/chat/completions", {"messages": QUESTION, "max_tokens": 2}),
    ):  # fmt: skip
        assert server.post(path, body).json()["choices"]
    assert server.get("/models").json()["data"][0]["id"] == "kvq-books"


def test_a_request_of_many_texts_takes_one_place_and_ends_with_its_client(server, client):
    import httpx

    server.until(active=0, waiting=0)
    body = {"prompt": [LONG] * 20, "n": 2, "max_tokens": 1500, "temperature": 1.5}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + "/v1/completions", json=body, timeout=0.3)
    server.until(active=0, waiting=0)
    done = client.completions.create(**MODEL, prompt=["It was late"] * 20, max_tokens=2)
    assert len(done.choices) == 20
    assert all(math.isfinite(choice.index) for choice in done.choices)
