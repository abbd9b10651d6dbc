"""Completions and chat as clients meet them: what the library generates, streamed or not, and what is told of it."""

from __future__ import annotations

import math

import openai
import pytest

from tests.tools.serving import LONG, QUESTION, library


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


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_parts_of_characters(client, model, stream):
    """Each has a name of its own, and the place of its character in the text."""
    text = "The sea 🐙🌊 is é."
    ids = model.encode(text)
    options = {"model": "kvq-books", "prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 5, "echo": True}
    if stream:
        found = [c.choices[0].logprobs for c in client.completions.create(**options, stream=True)]
        found = [each for each in found if each]
    else:
        found = [client.completions.create(**options).choices[0].logprobs]
    tokens = [token for each in found for token in each.tokens]
    places = [place for each in found for place in each.text_offset]
    raw = [bytes.fromhex(t[6:].replace("\\x", "")) if t.startswith("bytes:") else t.encode() for t in tokens]
    assert b"".join(raw[: len(ids)]).decode() == text
    assert any(token.startswith("bytes:\\x") for token in tokens)
    for at, place in enumerate(places[: len(ids)]):
        assert place == len(b"".join(raw[:at]).decode(errors="ignore"))
    for each in found:
        assert all(len(top) >= 5 for top in each.top_logprobs if top)  # none is lost by another of the same name


def test_what_ran_is_reported(client):
    done = client.completions.create(model="kvq-books", prompt=LONG * 2, extra_body={"policy": "int4"})
    assert done.kvq["policy"] == "int4"
    held = done.kvq["precisions"]
    assert (held["k8v8"], done.kvq["sink"], done.kvq["protect_bits"]) == (4, 4, 8)
    assert held["k8v8"] + held["k4v4"] + held["recent"] == done.kvq["tokens"]
    done = client.completions.create(model="kvq-books", prompt=LONG * 2, extra_body={"kv_bits": 4.5})
    assert done.kvq["policy"] == "adaptive"
    assert 3 < done.kvq["kv_bits"] <= 4.5 * max(1, 1024 / done.kvq["tokens"])  # short texts take what 1,024 tokens may
    assert done.kvq["kv_nbytes"] > 0


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


@pytest.mark.slow
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


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_hold_no_token_beyond_a_stop_string(client, stream):
    """However the string is cut into tokens, each of which may have come long before the string was whole."""
    options = {"model": "kvq-books", "prompt": LONG, "max_tokens": 40, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**options).choices[0]
    for first, length in ((7, 1), (10, 2), (12, 4), (20, 7)):
        offsets = [0]
        for token in whole.logprobs.tokens:
            offsets.append(offsets[-1] + len(token))
        stop = (
            whole.text[offsets[first] + 1 : offsets[first + length]] or whole.text[offsets[first] : offsets[first + 1]]
        )
        shown = whole.text.partition(stop)[0]
        if stream:
            chunks = [c.choices[0] for c in client.completions.create(**options, stop=stop, stream=True) if c.choices]
            text = "".join(chunk.text for chunk in chunks)
            tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens]
        else:
            choice = client.completions.create(**options, stop=stop).choices[0]
            text, tokens = choice.text, choice.logprobs.tokens
        assert text == shown
        assert tokens == whole.logprobs.tokens[: len(tokens)]
        assert "".join(tokens).startswith(shown)  # the last one may hold the beginning of the string
        assert not tokens or len("".join(tokens[:-1])) < max(1, len(shown))
