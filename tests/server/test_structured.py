"""Structured output as clients ask for it: every spelling of it, streams, several texts, and conversations."""

from __future__ import annotations

import json
import re
from typing import Literal

import openai
import pytest

from tests.tools.packages import needs
from tests.tools.schemas import SCHEMAS, problems, record
from tests.tools.serving import JSON, QUESTION

needs("llguidance"), needs("jsonschema")
MODEL = {"model": "kvq-books"}
PLACE = record(place={"enum": ["ship", "shore"]}, far={"type": "boolean"})
NAMED = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": PLACE}}


def chat(client, **options):
    return client.chat.completions.create(**{**MODEL, "messages": QUESTION, "max_tokens": 60, **options})


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_to(client, stream):
    if stream:
        chunks = list(chat(client, response_format=NAMED, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = chat(client, response_format=NAMED).choices[0].message.content
    assert problems(PLACE, text) == []


def test_the_clients_own_way_to_a_class(client):
    from pydantic import BaseModel

    class Place(BaseModel):
        far: bool
        where: Literal["ship", "shore"]

    done = client.chat.completions.parse(**MODEL, messages=QUESTION, response_format=Place, max_tokens=200, seed=1)
    assert isinstance(done.choices[0].message.parsed.far, bool)


@pytest.mark.parametrize(
    ("fields", "pattern", "cut"),  # cut: what the first tokens of a text without end are
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*\}", r"\{.*"),
        (
            {"response_format": {"type": "json_object", "schema": PLACE}},
            r'\{"place": "sh(ip|ore)", "far": (true|false)\}',
            None,
        ),
        ({"response_format": {"type": "regex", "value": "[0-9]{4}"}}, r"[0-9]{4}", None),
        ({"guided_json": PLACE}, r'\{"place": "sh(ip|ore)", "far": (true|false)\}', None),
        ({"guided_json": json.dumps(PLACE)}, r'\{"place": "sh(ip|ore)", "far": (true|false)\}', None),
        ({"json_schema": PLACE}, r'\{"place": "sh(ip|ore)", "far": (true|false)\}', None),
        ({"guided_regex": "(go )+!"}, r"(go )+!", r"(go )*(go?)?"),
        ({"guided_choice": ["yes", "no"]}, r"yes|no", None),
        ({"guided_grammar": 'start: "a" "b"+'}, r"ab+", r"ab*"),
        ({"structured_outputs": {"choice": ["up", "down"]}}, r"up|down", None),
        ({"structured_outputs": {"json": PLACE}}, r'\{"place": "sh(ip|ore)", "far": (true|false)\}', None),
    ],
    ids=str,
)
def test_every_spelling(server, fields, pattern, cut):
    for path, prompt in (("/v1/chat/completions", {"messages": QUESTION}), ("/v1/completions", {"prompt": "So: "})):
        choice = server.post(path, {**prompt, "max_tokens": 40, "temperature": 1, **fields}).json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        ended = choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern if ended or cut is None else f"{pattern}|{cut}", text, re.DOTALL)


def test_several_texts_keep_to_it_each(client):
    done = chat(client, response_format=NAMED, n=3, temperature=2, seed=1)
    assert [problem for choice in done.choices for problem in problems(PLACE, choice.message.content)] == []


def test_a_text_is_the_librarys_within_the_same_schema(client, model):
    template = model.chat_template
    options = {"max_tokens": 60, "seed": 7, "stop": template.stop, "stop_tokens": template.stop_tokens}
    responses = model.session().generate(template.encode(QUESTION), schema=PLACE, **options)
    expected = "".join(response.text for response in responses)
    assert chat(client, response_format=NAMED, seed=7).choices[0].message.content == expected


@pytest.mark.slow
def test_schemas_of_many_kinds_through_the_server(client):
    """A third of them; all go through the library in tests/session/test_structure.py."""
    for name, schema in list(SCHEMAS.items())[::3]:
        if schema is True:
            continue
        done = chat(client, response_format={"type": "json_schema", "json_schema": {"schema": schema}}, max_tokens=150)
        if done.choices[0].finish_reason == "stop":
            assert problems(schema, done.choices[0].message.content) == [], name


@pytest.mark.parametrize(
    ("schema", "word"),
    [({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"$ref": "http://example.com/a"}, "example.com")],
    ids=["unique", "elsewhere"],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused_by_name(client, schema, word):
    with pytest.raises(openai.BadRequestError, match=word) as caught:
        chat(client, response_format={"type": "json_schema", "json_schema": {"schema": schema}}, max_tokens=5)
    assert caught.value.param == "response_format"


def test_a_schema_of_a_megabyte_is_refused_before_anything_is_made_of_it(server):
    body = {"messages": QUESTION, "guided_json": {"enum": ["x" * 1000] * 1000}}
    answer = server.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert (answer.status_code, "at most" in answer.json()["error"]["message"]) == (400, True)
    assert len(answer.content) < 1000
