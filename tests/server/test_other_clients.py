"""Clients that people have, each in its own way: chats, streams, schemas, tools."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.tools.clients import CLIENTS, KEY, LLM, MOST, LangChain, LiteLLM
from tests.tools.packages import needs
from tests.tools.schemas import problems, record
from tests.tools.serving import library

pytestmark = pytest.mark.slow
NAME, WHERE = "kvq-books", "Where is the captain?"
PLACE = record(far={"type": "boolean"}, place={"enum": ["ship", "shore"]})


@pytest.fixture(scope="module", params=CLIENTS, ids=lambda kind: kind.__name__)
def asking(request, server, tmp_path_factory):
    return request.param(server.url, NAME, tmp_path_factory.mktemp("client"))


def answered(model, question):
    """What the library says."""
    template = model.chat_template
    stops = {"stop": template.stop, "stop_tokens": template.stop_tokens}
    ids = template.encode([{"role": "user", "content": question}])
    return library(model, ids, max_tokens=MOST, temperature=0, **stops)


def test_a_chat_says_what_the_library_says_and_so_does_its_stream(asking, model):
    expected = answered(model, WHERE)
    assert asking.ask(WHERE) == expected
    parts = list(asking.stream(WHERE))
    assert "".join(parts) == expected
    assert len(parts) > 3


def test_a_schema_is_kept_to(asking):
    needs("llguidance"), needs("jsonschema")
    assert problems(PLACE, asking.fill(WHERE, PLACE)) == []


def test_a_function_is_called_and_what_it_gave_is_answered(asking):
    needs("llguidance"), needs("jsonschema")
    calls, answer = asking.call(WHERE, "look", record(far={"type": "boolean"}))
    assert [name for name, _ in calls] == ["look"] or not (calls or asking.forces)
    assert all(set(arguments) == {"far"} for _, arguments in calls)
    assert answer is not None or not asking.forces


def test_litellm_s_further_options(server, tmp_path):
    asking = LiteLLM(server.url, NAME, tmp_path)
    more = {"presence_penalty": 0.5, "frequency_penalty": 0.1, "logit_bias": {"5": 1}, "user": "me"}
    assert len(asking.complete([{"role": "user", "content": WHERE}], n=2, **more).choices) == 2


def test_langchain_s_classes_and_batches(server, tmp_path):
    asking = LangChain(server.url, NAME, tmp_path)
    from pydantic import BaseModel

    class Place(BaseModel):
        far: bool

    for method in ("json_schema", "function_calling"):
        assert isinstance(asking.chat.with_structured_output(Place, method=method).invoke(WHERE).far, bool)
    assert len(asking.chat.batch(["Where?", "Who?"])) == 2


def test_llm_s_command(server, model, tmp_path):
    LLM(server.url, NAME, tmp_path)  # writes the entry
    command = [sys.executable, "-m", "llm", "-m", "kvq", "-o", "max_tokens", str(MOST), "-o", "temperature", "0", WHERE]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": KEY}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answered(model, WHERE).strip()
