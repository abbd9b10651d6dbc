"""The clients that people have, each asked the same things in its own way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.tools.packages import needs

MOST = 60  # tokens of an answer
KEY = "none"
TOOL_SAID = "It is sunny."


class Called(NamedTuple):
    """calls: functions and their arguments; answer: what was said once they had given `TOOL_SAID`."""

    calls: list[tuple[str, dict[str, Any]]]
    answer: str | None


class OpenAI:
    """The official one. Every client here is made with the address of a server, a model's name and an empty folder."""

    package = "openai"
    forces = True  # calls of tools

    def __init__(self, url: str, model: str, folder: Path) -> None:
        self.client = needs("openai").OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0)
        self.options: dict[str, Any] = {"model": model, "max_tokens": MOST, "temperature": 0}

    def complete(self, messages: list[Any], **options: Any) -> Any:
        """An answer, or a stream of parts."""
        return self.client.chat.completions.create(messages=messages, **self.options, **options)

    def ask(self, question: str) -> str:
        """The answer."""
        return self.complete([_user(question)]).choices[0].message.content

    def stream(self, question: str) -> Iterator[str]:
        """The answer in parts."""
        for part in self.complete([_user(question)], stream=True):
            yield part.choices[0].delta.content or ""

    def fill(self, question: str, schema: dict[str, Any]) -> str:
        """JSON of a schema."""
        form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
        return self.complete([_user(question)], response_format=form).choices[0].message.content

    def call(self, question: str, name: str, parameters: dict[str, Any]) -> Called:
        """Calls of a function, which are forced where the client can do that, and the answer that follows on them."""
        tools, messages = [_tool(name, parameters)], [_user(question)]
        forced: dict[str, Any] = (
            {"tool_choice": {"type": "function", "function": {"name": name}}} if self.forces else {}
        )
        said = self.complete(messages, tools=tools, **forced).choices[0].message
        calls = said.tool_calls or []
        messages += [said, *({"role": "tool", "tool_call_id": each.id, "content": TOOL_SAID} for each in calls)]
        found = [(each.function.name, json.loads(each.function.arguments)) for each in calls]
        return Called(found, self.complete(messages, tools=tools).choices[0].message.content if calls else None)


class LiteLLM(OpenAI):
    """litellm, told that the server is OpenAI's."""

    package, prefix, path = "litellm", "openai/", "/v1"

    def __init__(self, url: str, model: str, folder: Path) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices when it is imported
        self.litellm = needs("litellm")
        options = {"model": self.prefix + model, "api_base": url + self.path, "api_key": KEY}
        self.options = {**options, "max_tokens": MOST, "temperature": 0}

    def complete(self, messages: list[Any], **options: Any) -> Any:
        return self.litellm.completion(messages=messages, **self.options, **options)


class LiteLLMOllama(LiteLLM):
    """litellm, told that the server is ollama."""

    prefix, path, forces = "ollama_chat/", "", False


class Ollama:
    """ollama's own, whose API cannot force calls."""

    package = "ollama"
    forces = False

    def __init__(self, url: str, model: str, folder: Path) -> None:
        self.client = needs("ollama").Client(host=url)
        self.options: dict[str, Any] = {"model": model, "options": {"num_predict": MOST, "temperature": 0}}

    def ask(self, question: str) -> str:
        return self.client.chat(messages=[_user(question)], **self.options).message.content

    def stream(self, question: str) -> Iterator[str]:
        for part in self.client.chat(messages=[_user(question)], stream=True, **self.options):
            yield part.message.content or ""

    def fill(self, question: str, schema: dict[str, Any]) -> str:
        return self.client.chat(messages=[_user(question)], format=schema, **self.options).message.content

    def call(self, question: str, name: str, parameters: dict[str, Any]) -> Called:
        tools, messages = [_tool(name, parameters)], [_user(question)]
        said = self.client.chat(messages=messages, tools=tools, **self.options).message
        calls = said.tool_calls or []
        messages += [said, *({"role": "tool", "tool_name": name, "content": TOOL_SAID} for _ in calls)]
        found = [(each.function.name, dict(each.function.arguments)) for each in calls]
        again = self.client.chat(messages=messages, tools=tools, **self.options) if calls else None
        return Called(found, again.message.content if again else None)


class LangChain:
    """langchain-openai."""

    package = "langchain_openai"
    forces = True

    def __init__(self, url: str, model: str, folder: Path) -> None:
        make = needs("langchain_openai").ChatOpenAI
        self.chat = make(base_url=url + "/v1", api_key=KEY, model=model, max_tokens=MOST, temperature=0, max_retries=0)

    def ask(self, question: str) -> str:
        return self.chat.invoke(question).content

    def stream(self, question: str) -> Iterator[str]:
        for part in self.chat.stream(question):
            yield part.content

    def fill(self, question: str, schema: dict[str, Any]) -> str:
        titled = {"title": "form", "description": "A form", **schema}
        return json.dumps(self.chat.with_structured_output(titled, method="json_schema").invoke(question))

    def call(self, question: str, name: str, parameters: dict[str, Any]) -> Called:
        from langchain_core.messages import HumanMessage, ToolMessage

        tools, messages = [_tool(name, parameters)], [HumanMessage(question)]
        said = self.chat.bind_tools(tools, tool_choice=name).invoke(messages)
        told = [ToolMessage(TOOL_SAID, tool_call_id=each["id"]) for each in said.tool_calls]
        answer = self.chat.bind_tools(tools).invoke([*messages, said, *told])
        return Called([(each["name"], each["args"]) for each in said.tool_calls], answer.content)


class LLM:
    """llm, with the entry of docs/server.md in the file that it reads; its tools cannot be forced."""

    package = "llm"
    forces = False

    def __init__(self, url: str, model: str, folder: Path) -> None:
        llm = needs("llm")
        entry = f"model_name: {model}\n  api_base: {url}/v1\n  supports_schema: true\n  supports_tools: true\n"
        (folder / "extra-openai-models.yaml").write_text(f"- model_id: kvq\n  {entry}")
        os.environ["LLM_USER_PATH"] = str(folder)
        self.model, self.tool = llm.get_model("kvq"), llm.Tool
        self.options: dict[str, Any] = {"key": KEY, "max_tokens": MOST, "temperature": 0}

    def ask(self, question: str) -> str:
        return self.model.prompt(question, stream=False, **self.options).text()

    def stream(self, question: str) -> Iterator[str]:
        yield from self.model.prompt(question, stream=True, **self.options)

    def fill(self, question: str, schema: dict[str, Any]) -> str:
        return self.model.prompt(question, schema=schema, stream=False, **self.options).text()

    def call(self, question: str, name: str, parameters: dict[str, Any]) -> Called:
        found: list[tuple[str, dict[str, Any]]] = []

        def run(**arguments: Any) -> str:
            found.append((name, arguments))
            return TOOL_SAID

        tool = self.tool(name=name, description=_tool(name, parameters)["function"]["description"],
                         input_schema=parameters, implementation=run)  # fmt: skip
        options = {name: value for name, value in self.options.items() if name != "key"}
        talk = self.model.conversation()
        answer = talk.chain(question, tools=[tool], chain_limit=3, key=KEY, options=options)
        return Called(found, answer.text())


CLIENTS = (OpenAI, Ollama, LiteLLM, LiteLLMOllama, LangChain, LLM)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    described = {"name": name, "description": "The weather of a city", "parameters": parameters}
    return {"type": "function", "function": described}
