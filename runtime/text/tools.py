"""Calls of tools in a model's own words: how its chat template writes them, how they are read and forced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq.runtime.errors import ChatTemplateError, GrammarError
from kvq.runtime.text.grammar import JSON_OPTIONS, MOST, Structure
from kvq.runtime.text.schemas import held_exactly

if TYPE_CHECKING:
    from kvq.runtime.text.template import ChatTemplate

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
# Names and values that no template writes by itself, to find where it writes those that it is given.
PROBES = ("kvqprobeone", "kvqprobetwo")
PROBE_ID = "kvqcall01"  # nine letters and digits, which is what Mistral's templates ask for
PROBE_ARGUMENTS = {"kvqkey": "kvqvalue"}
ARGUMENTS = re.compile(r'\{\s*"kvqkey"\s*:\s*"kvqvalue"\s*\}')
ID = "[a-zA-Z0-9]{9}"
MOST_PARALLEL = 8  # calls in one answer, where they are forced


@dataclass(frozen=True)
class Tool:
    """A function that the model can ask for.

    name: of it.
    parameters: JSON schema of its arguments.
    definition: as the request has it, for the template.
    """

    name: str
    parameters: dict[str, Any]
    definition: dict[str, Any]


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: begin NAME middle ARGUMENTS (between NAME middle ARGUMENTS)* end.

    between: None where only one can be made.
    native: whether the template has it; else it is `PLAIN`, and tools are described in the system prompt.
    """

    begin: str
    middle: str
    end: str
    between: str | None
    native: bool

    @property
    def opener(self) -> str:
        """What announces a call wherever it stands; empty where only an answer that begins with one is a call."""
        words = self.begin.partition("{")[0].split()
        return next((word for word in reversed(words) if len(word) > 2), "")

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls as text; each {"function": {"name", "arguments"}}."""
        parts = []
        for call in calls:
            function = call["function"]
            parts.append(function["name"] + self.middle + json.dumps(function["arguments"], ensure_ascii=False))
        return self.begin + (self.between or self.end + "\n" + self.begin).join(parts) + self.end


# That of Hermes, Qwen and SmolLM2, for templates without one of their own.
PLAIN = CallFormat(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", '}\n</tool_call>\n<tool_call>\n{"name": "', False
)
DESCRIPTION = """\
You have access to the following functions, one JSON object a line within <tools></tools>:
<tools>
{tools}
</tools>
To call a function, write its name and arguments as a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{}}}}
</tool_call>"""


def call_format(template: ChatTemplate) -> CallFormat:
    """How a template writes calls, found by having it write some."""
    tool = {"name": PROBES[0], "description": "?", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": {**tool, "name": name}} for name in PROBES]
    question = {"role": "user", "content": "?"}

    def rest(names: Sequence[str], behind: Sequence[Mapping[str, Any]]) -> str:
        calls = [
            {"id": PROBE_ID, "type": "function", "function": {"name": name, "arguments": PROBE_ARGUMENTS}}
            for name in names
        ]
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        prompt = template.render_guarded([question], tools=tools)
        text = template.render_guarded([question, answer, *behind], False, tools=tools)
        if PROBES[0] not in prompt or not text.startswith(prompt):
            raise ChatTemplateError("it shows no tools, or writes what precedes a call in another way")
        return template.before_end(text[len(prompt) :])

    if template.builtin or not re.search(r"\btools\b", template.source):
        return PLAIN
    result = {"role": "tool", "content": "?", "name": PROBES[0], "tool_call_id": PROBE_ID}
    # Some write reasoning, or the lack of it, into the last answer; in an earlier one there is none.
    for behind in ([result, question], [result], []):
        try:
            one = _parts(rest(PROBES[:1], behind), PROBES[:1])
        except (ChatTemplateError, ValueError):
            continue
        try:
            between = _parts(rest(PROBES, [*behind[:1], *behind]), PROBES)[2]
        except (ChatTemplateError, ValueError):
            between = None
        return CallFormat(one[0], one[1], one[2], between, True)
    return PLAIN


def _parts(text: str, names: Sequence[str]) -> list[str]:
    """The texts before, between and behind names and arguments; ValueError where they are not in this order."""
    parts: list[str] = []
    for name in names:
        before, found, text = text.partition(name)
        arguments = ARGUMENTS.search(text)
        id_first = PROBE_ID in text[: arguments.start()] if arguments else False
        if not found or arguments is None or id_first or (not parts and PROBE_ID in before):
            raise ValueError("not to be found")
        parts += [before, text[: arguments.start()]]
        text = text[arguments.end() :]
    return [*parts, text]


def with_tools(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict]:
    """Messages in which tools are described, called and answered in text: for a template that knows none."""
    found: list[dict[str, Any]] = []
    for message in messages:
        kept = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
        if message.get("tool_calls"):
            kept["content"] = "\n".join(
                part for part in (message["content"], PLAIN.written(message["tool_calls"])) if part
            )
        if message["role"] == "tool":
            kept = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            if found and found[-1]["role"] == "user" and found[-1]["content"].startswith("<tool_response>"):
                found[-1]["content"] += "\n" + kept["content"]
                continue
        found.append(kept)
    if not tools:
        return found
    listed = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    text = DESCRIPTION.format(tools=listed)
    where = "system" if template.takes_system else "user"
    first = next((message for message in found[:1] if message["role"] == where), None)
    if first is None:
        return [{"role": where, "content": text}, *found]
    first["content"] = f"{first['content']}\n\n{text}" if where == "system" else f"{text}\n\n{first['content']}"
    return found


def forced_calls(template: ChatTemplate, form: CallFormat, tools: Sequence[Tool], parallel: bool) -> Structure:
    """The grammar of an answer that calls one of these tools, or several, with arguments of their schemas.

    Raises:
        GrammarError: their schemas are too large together, or nest too deeply.
    """
    rules = [f"start: {_literal(template, form.begin)} call {{more}} {_literal(template, form.end)}"]
    more = ""
    if parallel and form.between is not None:
        more = f"({_literal(template, form.between)} call){{0,{MOST_PARALLEL - 1}}}"
    rules[0] = rules[0].replace("{more}", more)
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        schema = {"type": "object", **held_exactly(tool.parameters)}
        if not {"additionalProperties", "$ref", "allOf", "anyOf", "oneOf", "patternProperties"} & schema.keys():
            schema["additionalProperties"] = False  # arguments that nobody has declared are of no use
        schema["x-guidance"] = JSON_OPTIONS
        name = _literal(template, tool.name + form.middle)
        rules.append(f"call_{i}: {name} arguments_{i}\narguments_{i}: %json {json.dumps(schema)}")
    text = "\n".join(rules)
    if len(text) > 2 * MOST["schema"]:
        raise GrammarError("the tools' schemas are too large together; offer fewer")
    return Structure("grammar", text)


def _literal(template: ChatTemplate, text: str) -> str:
    """A text in a grammar of Lark's form; special tokens by their ids."""
    parts = []
    for at, piece_of_text in enumerate(text.split(PROBE_ID)):
        parts += [f"/{ID}/"] * (at > 0)
        for piece, token in template.special_pieces(piece_of_text):
            parts.append(f"<[{token}]>" if token is not None else json.dumps(piece, ensure_ascii=False))
    return " ".join(parts)


class CallReader:
    """Takes the text of an answer as it comes, and tells calls from it.

    Args:
        form: how calls are written; special tokens in it are not in the text.
        names: of the tools.
        hidden: texts of the special tokens.
        single: nothing behind the first call is looked at.

    `push` and `flush` give pieces: ("text", text), ("call", name), and ("arguments", JSON text) of the last call.
    """

    def __init__(
        self, form: CallFormat, names: Sequence[str], hidden: Sequence[str] = (), single: bool = False
    ) -> None:
        shown = {name: _without(getattr(form, name) or "", hidden) for name in ("begin", "middle", "end", "between")}
        self._opener = CallFormat(shown["begin"], "", "", None, True).opener
        shown["begin"] = shown["begin"][shown["begin"].rfind(self._opener) :]
        self._names, self._single = set(names), single
        name = rf"(?P<name>{NAME.pattern})"
        flexible = {key: _flexible(text) for key, text in shown.items()}
        self._head = re.compile(flexible["begin"] + name + flexible["middle"] + r"(?=\{)")
        self._next = re.compile(flexible["between"] + name + flexible["middle"] + r"(?=\{)") if form.between else None
        self._end = re.compile(flexible["end"])
        between, opener = _squeezed(shown["between"]), _squeezed(self._opener)
        self._following = [(_squeezed(shown["end"]), False), (between, bool(between)), (opener, bool(opener))]
        self._held = ""
        self._state = "start"
        self._depth = 0
        self._quoted = self._escaped = False
        self.calls = 0

    def push(self, text: str) -> list[tuple[str, str]]:
        """What is certain once this text has come."""
        self._held += text
        pieces: list[tuple[str, str]] = []
        while self._step(pieces):
            pass
        return [piece for piece in pieces if piece[1]]

    def flush(self) -> list[tuple[str, str]]:
        """What is left at the end."""
        held, self._held = self._held, ""
        if self._state == "arguments":
            return [("arguments", held)] if held else []
        if self._state == "behind":
            found = self._end.match(held)
            held = held[found.end() :] if found else held
            return [] if self._single or self._begun(held) else [("text", held)]
        pieces = self._unordered(held) if self._state == "head" else None
        return pieces if pieces is not None else [("text", held)] if held else []

    def _begun(self, held: str) -> bool:
        """Whether what stands behind a call is the beginning of its end or of a further call, or blank."""
        rest = _squeezed(held)
        return any(text.startswith(rest) or (further and rest.startswith(text)) for text, further in self._following)

    def _step(self, pieces: list[tuple[str, str]]) -> bool:
        """One step; False where more text is needed."""
        if self._state == "start":
            return self._find(pieces)
        if self._state == "head":
            found = self._head.match(self._held)
            return found is not None and self._open(found, pieces)
        if self._state == "arguments":
            return self._arguments(pieces)
        if self._state == "plain":
            pieces.append(("text", self._held))
            self._held = ""
            return False
        found = self._next.match(self._held) if self._next is not None and not self._single else None
        return found is not None and self._open(found, pieces)

    def _find(self, pieces: list[tuple[str, str]]) -> bool:
        """Look for the beginning of a call; text before it is told."""
        if not self._opener:
            blank = len(self._held) - len(self._held.lstrip())
            if blank == len(self._held):
                return False
            if self._held[blank] in "{[":
                self._state = "head"
                return True
            pieces.append(("text", self._held))
            self._held, self._state = "", "plain"
            return False
        at = self._held.find(self._opener)
        if at >= 0:
            if self._held[:at].strip():
                pieces.append(("text", self._held[:at]))
            self._held, self._state = self._held[at:], "head"
            return True
        keep = max((n for n in range(1, len(self._opener)) if self._held.endswith(self._opener[:n])), default=0)
        keep = max(keep, len(self._held) - len(self._held.rstrip()))  # blanks before a call are no text
        pieces.append(("text", self._held[: len(self._held) - keep]))
        self._held = self._held[len(self._held) - keep :]
        return False

    def _open(self, found: re.Match[str], pieces: list[tuple[str, str]]) -> bool:
        if found["name"] not in self._names:
            pieces.append(("text", self._held))
            self._held, self._state = "", "plain"
            return False
        pieces.append(("call", found["name"]))
        self._held, self._state = self._held[found.end() :], "arguments"
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls += 1
        return True

    def _arguments(self, pieces: list[tuple[str, str]]) -> bool:
        for at, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    pieces.append(("arguments", self._held[: at + 1]))
                    self._held, self._state = self._held[at + 1 :], "behind"
                    return True
        pieces.append(("arguments", self._held))
        self._held = ""
        return False

    def _unordered(self, held: str) -> list[tuple[str, str]] | None:
        """A call whose name and arguments come in another order, or under other names; None if it is none."""
        text = held[held.find("{") :] if "{" in held else ""
        try:
            value, _ = json.JSONDecoder().raw_decode(text)
            value = value if isinstance(value, dict) else {}
            name = value.get("name")
            arguments = next((value[key] for key in ("arguments", "parameters", "args") if key in value), None)
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return None
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            written.encode()  # half a surrogate cannot be sent
        except (ValueError, RecursionError):
            return None
        self.calls += 1
        return [("call", name), ("arguments", written)]


def _without(text: str, hidden: Sequence[str]) -> str:
    for special in hidden:
        text = text.replace(special, "")
    return text


def _squeezed(text: str) -> str:
    """A text without its blanks, which models set as they like."""
    return "".join(text.split())


def _flexible(text: str) -> str:
    """A pattern for a text, with blanks wherever JSON has room for them."""
    parts: list[str] = []
    for character in text:
        if character.isspace():
            parts.append(r"\s*")
        else:
            parts.append(rf"\s*{re.escape(character)}\s*" if character in "{}[]:," else re.escape(character))
    pattern = re.sub(r"(\\s\*)+", r"\\s*", r"\s*" + "".join(parts) + r"\s*")
    return pattern.replace(PROBE_ID, ID)
