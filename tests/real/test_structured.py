"""Structured output and tools of a model that knows something: valid, and what was asked for."""

from __future__ import annotations

import json

import pytest

from kvq.composition import open_bundle
from kvq.runtime.text.grammar import structure_of
from kvq.runtime.text.tools import CallReader, Tool, forced_calls, with_tools
from tests.tools.packages import needs
from tests.tools.schema_suite import filled
from tests.tools.schemas import SCHEMAS, record

needs("llguidance"), needs("jsonschema")


@pytest.fixture(scope="module")
def model(real_bundle):
    return open_bundle(real_bundle)


def text(responses) -> str:
    return "".join(response.text for response in responses)


@pytest.mark.slow
def test_every_finished_output_of_some_schemas_is_valid(model):
    """Of all of them: `python -m tests.tools.schema_suite smollm2-135m-instruct`."""
    rows = list(filled(model, dict(list(SCHEMAS.items())[1::6]), most=60))
    assert [(row.name, row.problems) for row in rows if row.problems] == []
    assert sum(row.finished for row in rows) > 8


@pytest.mark.slow
def test_an_answer_within_a_schema_is_still_the_answer(model):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    schema = record(capital={"type": "string", "maxLength": 20})
    found = json.loads(text(model.generate(question, schema=schema, temperature=0.0)))
    assert found == {"capital": "Paris"}
    choice = [f"The capital of France is {city}." for city in ("London", "Paris", "Rome")]
    assert text(model.generate(question, choice=choice, temperature=0.0)) == choice[1]


@pytest.mark.slow
def test_a_forced_call_has_what_was_asked_about(model):
    parameters = record(city={"type": "string", "maxLength": 20})
    function = {"name": "get_weather", "description": "Weather of a city", "parameters": parameters}
    tool = Tool("get_weather", parameters, {"type": "function", "function": function})
    template = model.chat_template
    messages = with_tools(template, [{"role": "user", "content": "What is the weather in Paris?"}], [tool])
    constraint = model.grammar(forced_calls(template, template.calls, [tool], False)).begin()
    answer = text(model.session().generate(template.encode(messages), constraint=constraint, temperature=0.0))
    reader = CallReader(template.calls, ["get_weather"])
    pieces = reader.push(answer) + reader.flush()
    assert pieces[0] == ("call", "get_weather")
    assert "".join(value for kind, value in pieces if kind == "arguments") == '{"city": "Paris"}'


@pytest.mark.slow
def test_a_grammar_is_compiled_once_for_the_same_structure(model):
    structure = structure_of(schema=record(a={"type": "boolean"}))
    assert model.grammar(structure) is model.grammar(structure)
