"""/v1/responses by the official client: texts, streams, conversations, schemas, functions."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from tests.tools.packages import needs
from tests.tools.schemas import problems
from tests.tools.serving import QUESTION

ASKED = {"model": "kvq-books", "input": "Where is the captain?", "max_output_tokens": 20, "temperature": 0}
PLACE = {
    "type": "object", "properties": {"place": {"enum": ["ship", "shore"]}}, "required": ["place"],
    "additionalProperties": False,
}  # fmt: skip
LOOK = {"type": "function", "name": "look", "description": "Look there", "parameters": PLACE, "strict": True}


def said(client, messages, **options) -> str:
    """What the chat API answers."""
    options = {"model": "kvq-books", "max_tokens": 20, "temperature": 0, **options}
    return client.chat.completions.create(messages=messages, **options).choices[0].message.content


def test_a_text_is_what_the_chat_says(client):
    answer = client.responses.create(**ASKED)
    assert answer.output_text == said(client, QUESTION)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (20, 20 + answer.usage.input_tokens)
    assert answer.kvq["finish_reason"] == "length"
    parts = [{"type": "input_text", "text": QUESTION[0]["content"]}]
    listed = client.responses.create(**{**ASKED, "input": [{"role": "user", "content": parts}]}, instructions="Sing.")
    assert listed.output_text == said(client, [{"role": "system", "content": "Sing."}, *QUESTION])
    ended = client.responses.create(**ASKED, extra_body={"stop": [answer.output_text[8:]]})
    assert (ended.status, ended.output_text) == ("completed", answer.output_text[:8])


def test_a_stream_has_the_events_that_the_client_puts_together(client):
    whole = client.responses.create(**ASKED).output_text
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
    final = events[-1].response
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole
    assert len(deltas) > 5
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_conversation_goes_on_by_the_id_of_the_last_response(client):
    first = client.responses.create(**ASKED, instructions="Sing.")
    second = client.responses.create(**{**ASKED, "input": "Why?"}, previous_response_id=first.id)
    messages = [*QUESTION, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Why?"}]
    assert second.output_text == said(client, messages)  # instructions are of one request
    again = [{"role": "user", "content": "Where is the captain?"}, *(each.model_dump() for each in first.output)]
    listed = client.responses.create(**{**ASKED, "input": [*again, {"role": "user", "content": "Why?"}]})
    assert listed.output_text == second.output_text
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError, match="is kept"):
        client.responses.create(**ASKED, previous_response_id=second.id)
    unkept = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError, match="is kept"):
        client.responses.retrieve(unkept.id)


def test_a_schema(client):
    needs("llguidance")

    class Place(pydantic.BaseModel):
        far: bool

    parsed = client.responses.parse(**{**ASKED, "max_output_tokens": 60}, text_format=Place)
    assert isinstance(parsed.output_parsed, Place)
    assert parsed.status == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_functions(client, stream):
    needs("llguidance"), needs("jsonschema")
    asked = {**ASKED, "max_output_tokens": 200, "tools": [LOOK], "tool_choice": {"type": "function", "name": "look"}}
    if stream:
        with client.responses.stream(**asked) as streamed:
            pieces = [e.delta for e in streamed if e.type == "response.function_call_arguments.delta"]
            answer = streamed.get_final_response()
        assert "".join(pieces) == answer.output[0].arguments
    else:
        answer = client.responses.create(**asked)
    (call,) = answer.output
    assert (call.type, call.name, problems(PLACE, call.arguments)) == ("function_call", "look", [])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "nobody is there"}
    following = client.responses.create(
        **{**ASKED, "input": [result]}, previous_response_id=answer.id, tools=[LOOK], tool_choice="none"
    )
    function = {"name": "look", "arguments": call.arguments}
    messages = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "nobody is there"},
    ]
    chat_tool = {"type": "function", "function": {k: v for k, v in LOOK.items() if k != "type"}}
    assert following.output_text == said(client, messages, tools=[chat_tool], tool_choice="none")
    sent = [{"role": "user", "content": ASKED["input"]}, call.model_dump(), result]
    again = client.responses.create(**{**ASKED, "input": sent}, tools=[LOOK], tool_choice="none")
    assert again.output_text == following.output_text


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"input": []}, "input", "non-empty"),
        ({"input": None}, "input", "non-empty"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "text parts only"),
        ({"input": ["x"]}, "input[0]", "object"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "not supported"),
        ({"input": [{"type": "reasoning"}]}, "input", "no message"),
        ({"input": [{"type": "function_call"}]}, None, "function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "must be function"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "is kept"),
        ({"zzz": 1}, "zzz", "unknown field"),
        ({"text": {"format": {"type": "xml"}}}, None, "must be"),
        ({"temperature": -1}, None, "temperature"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, changes, param, words):
    answer = server.post("/v1/responses", {**ASKED, **changes})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert words in error["message"]
    assert param is None or error["param"] == param


def test_kept_conversations_are_bounded():
    from kvq.runtime.errors import RequestError
    from kvq.runtime.server.asking import MOST_KEPT, MOST_KEPT_CHARACTERS, Kept

    kept = Kept()
    for i in range(MOST_KEPT + 1):
        kept.add(f"r{i}", [{"role": "user", "content": str(i)}], {})
    with pytest.raises(RequestError, match="no response 'r0'"):
        kept.find("r0")
    assert kept.find("r1")[0][0]["content"] == "1"
    kept.add("long", [{"role": "user", "content": "x" * (MOST_KEPT_CHARACTERS - 100)}], {})
    assert kept.find("long")
    with pytest.raises(RequestError):
        kept.find("r5")
    assert kept.find("r1")  # used since
    kept.remove("long")
    with pytest.raises(RequestError):
        kept.remove("long")


def test_an_unfinished_call_is_no_call_in_what_follows():
    from kvq.runtime.server.choices import Call
    from kvq.runtime.server.outputs import _call

    assert json.loads(_call(Call("a", "look", '{"place": "sh'))["function"]["arguments"]) == {}
