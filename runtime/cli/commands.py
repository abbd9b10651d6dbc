"""`kvq chat --tools`: commands that the user has listed, as tools; each call is shown and confirmed before it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvq.runtime.cli.questions import MOST_TEXT
from kvq.runtime.errors import PromptError
from kvq.runtime.files import read_bounded
from kvq.runtime.text.tools import NAME, PLAIN, CallReader, Tool, with_tools

if TYPE_CHECKING:
    from kvq.runtime.text.template import ChatTemplate

MOST_TOOLS, MOST_PARTS = 64, 64
MOST_OUTPUT = 8_000  # characters of what a command says
MOST_BYTES = 1_000_000  # after which it is ended: the arguments are the model's, and some files have no end
READ_BYTES = 1 << 16
TIMEOUT_S = 30.0
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class ToolCommand:
    """A tool that is a command.

    Attributes:
        tool: what the model is told of it.
        command: program and arguments; {name} in one stands for the argument of that name.
        timeout: seconds after which it is ended.
    """

    tool: Tool
    command: tuple[str, ...]
    timeout: float

    def argv(self, arguments: dict[str, Any]) -> list[str]:
        """Program and arguments of a call. No shell reads them, so an argument stays one, whatever it holds.

        A part that is nothing but the place of an argument that was not given is left out.

        Raises:
            PromptError: an argument is missing, unknown, or no text, number or truth value.
        """
        places = set(PLACE.findall(" ".join(self.command)))
        if unknown := sorted(arguments.keys() - places):
            raise PromptError(f"{self.tool.name} takes no {unknown[0]!r:.40}")
        texts = {}
        for name, value in arguments.items():
            if not isinstance(value, str | int | float | bool) or "\0" in str(value):
                raise PromptError(f"{name:.40} of {self.tool.name} must be a text, a number or a truth value")
            texts[name] = value if isinstance(value, str) else json.dumps(value)
        found = []
        for part in self.command:
            names = PLACE.findall(part)
            missing = [name for name in names if name not in texts]
            if missing and part == f"{{{missing[0]}}}":
                continue
            if missing:
                raise PromptError(f"{self.tool.name} needs {missing[0]}")
            found.append(PLACE.sub(lambda place: texts[place[1]], part))
        return found

    def run(self, argv: Sequence[str]) -> str:
        """What a command says, both streams together, the beginning of it; and how it ended, if not well."""
        try:
            said, code, ended = _said(argv, self.timeout)
        except (OSError, ValueError) as error:
            return f"error: {error}"
        text = said.decode(errors="replace").strip()
        if len(text) > MOST_OUTPUT:
            text = text[:MOST_OUTPUT] + f"\n[{len(text) - MOST_OUTPUT} more characters]"
        if ended:
            return f"{text}\n[ended after {ended}]".strip()
        return text if not code else f"{text}\n[exit code {code}]".strip()


def _said(argv: Sequence[str], timeout: float) -> tuple[bytes, int, str]:
    """What a command says, its exit code, and after what it was ended; "" if it ended by itself."""
    said, deadline, ended = bytearray(), time.monotonic() + timeout, ""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read(stream: IO[bytes]) -> None:
        with stream:
            while len(said) <= MOST_BYTES and (piece := os.read(stream.fileno(), READ_BYTES)):
                said.extend(piece)

    # In a thread, which nobody waits for: what the command has begun may hold the pipe for ever.
    reader = threading.Thread(target=read, args=[process.stdout], daemon=True)
    reader.start()
    try:
        reader.join(timeout)
        if len(said) > MOST_BYTES:
            ended = f"{MOST_BYTES:,} bytes"
        elif reader.is_alive():
            ended = f"{timeout:g} s"
        else:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        ended = f"{timeout:g} s"
    finally:
        process.kill()
        code = process.wait()
    return bytes(said), code, ended


def read_tools(path: Path) -> list[ToolCommand]:
    """The tools of a file: a JSON list of {"name", "description", "parameters", "command", "timeout"}.

    Raises:
        PromptError: it is none.
    """
    try:
        value = json.loads(read_bounded(path, MOST_TEXT))
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{path} cannot be read ({error!s:.80}); it must be a JSON list of tools") from None
    if not isinstance(value, list) or not value or len(value) > MOST_TOOLS:
        raise PromptError(f"{path} must be a JSON list of 1 to {MOST_TOOLS} tools")
    tools = [_tool(each, f"{path}: tool {number}") for number, each in enumerate(value, 1)]
    if len({each.tool.name for each in tools}) < len(tools):
        raise PromptError(f"{path}: two tools have the same name; give them different ones")
    return tools


def _tool(value: Any, where: str) -> ToolCommand:
    if not isinstance(value, dict):
        raise PromptError(f"{where} must be an object with name and command")
    if unknown := sorted(value.keys() - {"name", "description", "parameters", "command", "timeout"}):
        raise PromptError(f"{where} has an unknown field {unknown[0]!r:.40}; leave it out")
    name, timeout = value.get("name"), value.get("timeout", TIMEOUT_S)
    command: Any = value.get("command")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PromptError(f"{where}: name must be 1 to 128 letters, digits, _, . or -")
    texts = isinstance(command, list) and all(isinstance(part, str) and "\0" not in part for part in command)
    if not texts or not 0 < len(command) <= MOST_PARTS or PLACE.search(command[0]):
        raise PromptError(f'{where}: command must be a list of texts, the program first: ["date", "+%A"]')
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 3600:
        raise PromptError(f"{where}: timeout must be seconds, above 0 and at most 3600")
    places = dict.fromkeys(PLACE.findall(" ".join(command)))
    texts_alone = {"type": "object", "properties": {place: {"type": "string"} for place in places}}
    parameters = value.get("parameters", texts_alone)
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
        raise PromptError(f"{where}: parameters must be a JSON schema of an object")
    if strange := sorted(parameters.get("properties", {}).keys() ^ places.keys()):
        raise PromptError(f"{where}: {strange[0]} must be both in parameters and in the command, as {{{strange[0]}}}")
    function = {"name": name, "description": value.get("description", ""), "parameters": parameters}
    definition = {"type": "function", "function": function}
    return ToolCommand(Tool(name, parameters, definition), tuple(command), float(timeout))


class Toolbox:
    """The tools of a chat.

    Args:
        tools: those there are.
    """

    def __init__(self, tools: Sequence[ToolCommand]) -> None:
        self._tools = {each.tool.name: each for each in tools}

    def system(self, template: ChatTemplate, system: str | None) -> str:
        """A system prompt that tells of the tools, in the form that Hermes, Qwen and SmolLM2 use.

        Raises:
            PromptError: the model's template has no place for one.
        """
        if not template.takes_system:
            raise PromptError("--tools needs a model whose chat template takes a system prompt")
        messages = [] if system is None else [{"role": "system", "content": system}]
        return with_tools(template, messages, [each.tool for each in self._tools.values()])[0]["content"]

    def known(self, system: str) -> bool:
        """Whether a system prompt tells of all of them."""
        definitions = (json.dumps(each.tool.definition, ensure_ascii=False) for each in self._tools.values())
        return all(definition in system for definition in definitions)

    def calls(self, text: str) -> list[tuple[ToolCommand, str]]:
        """The calls in an answer: tools and their arguments, as JSON text."""
        reader = CallReader(PLAIN, list(self._tools))
        found: list[tuple[ToolCommand, str]] = []
        for kind, piece in [*reader.push(text), *reader.flush()]:
            if kind == "call":
                found.append((self._tools[piece], ""))
            elif kind == "arguments":
                found[-1] = found[-1][0], found[-1][1] + piece
        return found


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call.

    Raises:
        PromptError: they are no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PromptError("the arguments are no JSON object")
    return value


def response(results: Sequence[str]) -> str:
    """What commands have said, as the model is told it."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
