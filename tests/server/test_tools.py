"""Tools through the server by the official client: forced calls, streams, answers to calls."""

from __future__ import annotations

import json

import pytest

from kvq.runtime.server.choices import Call
from kvq.runtime.server.ollama import _call as ollama_call
from kvq.runtime.server.outputs import _call as chat_call
from tests.tools.packages import needs
from tests.tools.schemas import problems
from tests.tools.serving import QUESTION

needs("llguidance"), needs("jsonschema")
PLACE = {
    "type": "object", "properties": {"place": {"enum": ["ship", "shore"]}, "far": {"type": "boolean"}},
    "required": ["place", "far"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Look there", "parameters": PLACE, "strict": True},
    },
    {"type": "function", "function": {"name": "wait"}},
]
NAMED = {"type": "function", "function": {"name": "look"}}


def chat(client, **options):
    options = {"model": "kvq-books", "messages": QUESTION, "tools": TOOLS, "max_tokens": 400, "seed": 3, **options}
    return client.chat.completions.create(**options)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_has_valid_arguments(client, choice, stream):
    if stream:
        calls: dict[int, dict] = {}
        chunks = list(chat(client, tool_choice=choice, stream=True))
        for delta in (call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []):
            made = calls.setdefault(delta.index, {"name": "", "arguments": "", "id": delta.id})
            made["name"] += delta.function.name or ""
            made["arguments"] += delta.function.arguments or ""
            assert delta.id in (made["id"], None)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
        finish, found = chunks[-1].choices[0].finish_reason, [calls[i] for i in range(len(calls))]
    else:
        made = chat(client, tool_choice=choice).choices[0]
        finish, found = made.finish_reason, [vars(call.function) | {"id": call.id} for call in made.message.tool_calls]
        assert made.message.content is None
    assert finish == "tool_calls"
    assert len({call["id"] for call in found}) == len(found) >= 1
    assert len(found) == 1 or choice != NAMED
    for call in found:
        if call["name"] == "look":
            assert problems(PLACE, call["arguments"]) == []
        else:
            assert (call["name"], choice) == ("wait", "required")
            assert json.loads(call["arguments"]) == {}


def test_a_single_call_if_no_more_are_wanted(client):
    for seed in range(4):
        done = chat(client, tool_choice="required", parallel_tool_calls=False, seed=seed, temperature=1.5)
        assert len(done.choices[0].message.tool_calls) == 1


def test_several_texts_have_their_own_calls(client):
    done = chat(client, tool_choice=NAMED, n=3, temperature=2)
    calls = [call for choice in done.choices for call in choice.message.tool_calls]
    assert len({call.id for call in calls}) == len(calls) == 3


def test_what_a_tool_has_said_goes_back(client, model):
    call = chat(client, tool_choice=NAMED).choices[0].message
    answer = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "a gull"}
    done = chat(client, messages=[*QUESTION, call, answer], tool_choice="none", max_tokens=5)
    assert done.choices[0].message.tool_calls is None
    assert done.usage.prompt_tokens > chat(client, tool_choice="none", max_tokens=5).usage.prompt_tokens


def test_without_being_forced_the_model_may_say_what_it_likes(client):
    done = chat(client, max_tokens=12, temperature=0)
    assert done.choices[0].message.content
    assert done.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("said", ['{"a": ' + "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a'])
def test_arguments_that_cannot_be_sent_are_none(said):
    """A model may write anything, and what it writes must not end the reply."""
    assert ollama_call(Call("1", "look", said))["function"] == {"name": "look", "arguments": {}}
    assert ollama_call(Call("1", "look", '{"a": [1.5, "é"]}'))["function"]["arguments"] == {"a": [1.5, "é"]}
    text = chat_call(Call("1", "look", said))["function"]["arguments"]
    assert text == said if said.endswith("}") else text == "{}"
