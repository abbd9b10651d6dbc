"""Clients that are not part of the test environment, where they are installed: litellm, langchain-openai, llm."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.tools.packages import needs
from tests.tools.serving import QUESTION

PLACE = {
    "type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"], "additionalProperties": False,
}  # fmt: skip
LOOK = {"type": "function", "function": {"name": "look", "parameters": PLACE}}


@pytest.mark.slow
def test_litellm(server):
    litellm = pytest.importorskip("litellm")
    needs("llguidance")
    options = {
        "model": "openai/kvq-books", "api_base": server.url + "/v1", "api_key": "none", "messages": QUESTION,
        "max_tokens": 60, "seed": 1,
    }  # fmt: skip
    whole = litellm.completion(**options).choices[0].message.content
    parts = litellm.completion(**options, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    assert set(json.loads(litellm.completion(**options, response_format=schema).choices[0].message.content)) == {"far"}
    (call,) = litellm.completion(
        **options, tools=[LOOK], tool_choice={"type": "function", "function": {"name": "look"}}
    ).choices[0].message.tool_calls  # fmt: skip
    assert set(json.loads(call.function.arguments)) == {"far"}
    more = {"presence_penalty": 0.5, "frequency_penalty": 0.1, "logit_bias": {"5": 1}, "user": "me"}
    assert len(litellm.completion(**options, n=2, **more).choices) == 2
    local = {**options, "model": "ollama_chat/kvq-books", "api_base": server.url}
    assert litellm.completion(**local).choices[0].message.content


@pytest.mark.slow
def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai")
    needs("llguidance")
    from pydantic import BaseModel

    class Place(BaseModel):
        far: bool

    model = langchain.ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="kvq-books", max_tokens=60, seed=1)
    whole = model.invoke("Where is he?").content
    assert "".join(part.content for part in model.stream("Where is he?")) == whole
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Place, method=method).invoke("Where is he?")
        assert isinstance(found.far, bool)
    assert len(model.batch(["Where?", "Who?"])) == 2


@pytest.mark.slow
def test_llm(server, tmp_path):
    if importlib.util.find_spec("llm") is None:
        pytest.skip("llm is not installed")
    needs("llguidance")
    entry = f"model_name: kvq-books\n  api_base: {server.url}/v1\n  supports_schema: true\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(f"- model_id: books\n  {entry}")
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    schema = ["--schema", json.dumps(PLACE), "Is it?"]
    for arguments in (["Where is he?"], ["--no-stream", "-s", "Be brief.", "Who?"], schema):
        command = [sys.executable, "-m", "llm", "-m", "books", "-o", "max_tokens", "20", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
