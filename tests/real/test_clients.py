"""The clients of `tests/server/test_other_clients.py`, with a model that knows something."""

from __future__ import annotations

import json

import pytest

from tests.tools.clients import CLIENTS
from tests.tools.packages import needs
from tests.tools.real import NAME
from tests.tools.schemas import record
from tests.tools.serving import served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(real_home):
    with served("-m", NAME, env={"KVQ_HOME": str(real_home)}) as server:
        yield server


@pytest.fixture(scope="module", params=CLIENTS, ids=lambda kind: kind.__name__)
def asking(request, server, tmp_path_factory):
    return request.param(server.url, NAME, tmp_path_factory.mktemp("client"))


def test_a_question_is_answered_at_once_and_as_a_stream(asking):
    question = "What is the capital of France? Answer in one sentence."
    assert asking.ask(question) == "The capital of France is Paris."
    assert "".join(asking.stream(question)) == "The capital of France is Paris."


def test_a_schema_s_field_is_the_answer(asking):
    needs("llguidance")
    schema = record(capital={"type": "string", "maxLength": 20})
    assert json.loads(asking.fill("What is the capital of France?", schema)) == {"capital": "Paris"}


def test_a_call_has_what_was_asked_about(asking):
    needs("llguidance")
    calls, answer = asking.call("What is the weather in Paris?", "get_weather", record(city={"type": "string"}))
    if asking.forces:
        assert calls == [("get_weather", {"city": "Paris"})]
        assert answer
    for _, arguments in calls:  # a model as small as this one may do without
        assert arguments == {"city": "Paris"}
