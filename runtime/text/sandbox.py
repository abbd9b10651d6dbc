"""Running a chat template: jinja2's immutable sandbox, with its steps and the size of what it makes bounded.

jinja2 keeps a template from reaching Python's internals and from changing what it is given. That it
ends, and within a laptop's memory, is seen to here.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from kvq.runtime.errors import ChatTemplateError

MOST_TEMPLATE_BYTES = 1 << 18  # the longest published ones, with tools, take 20 kB
MOST_STEPS = 100_000  # rounds of loops and calls in one rendering; jinja2's own limit for range()
MOST_CHARACTERS = 1 << 22  # of all text a rendering makes on its way, and sixteen times what the messages hold
# No template needs them, and their results can be far longer than what they are given.
BARRED_METHODS = {"center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"}
BARRED_FILTERS = ("batch", "center", "format", "indent", "pprint", "slice", "urlize", "wordwrap", "xmlattr")

# (messages, add_generation_prompt, special tokens) -> text
Program = Callable[[list[dict[str, str]], bool, dict[str, str]], str]


class Allowance(threading.local):
    """What is left of the bounds in the rendering that this thread is at."""

    steps = 0
    characters = 0

    def step(self, count: int = 1) -> None:
        """Take steps from what is left."""
        self.steps -= count
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MOST_STEPS} steps")

    def make(self, characters: int) -> None:
        """Take the characters of a text that is about to be made."""
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError("it makes more text than its messages account for")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.allowance = Allowance()
        for name in BARRED_FILTERS:
            del self.filters[name]
        self.filters.update(
            tojson=tojson, counted=self.counted, concatenated=self.joined, join=self.joined, replace=self.replaced
        )
        del self.globals["lipsum"]
        self.globals.update(range=self.counted_range, raise_exception=raise_exception, strftime_now=strftime_now)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in BARRED_METHODS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No wrapper for str.format: it is barred."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not all(
            isinstance(value, int | float) and abs(value) < 1000 for value in (left, right)
        ):
            raise SecurityError("it computes a power of large numbers")
        if operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            once, times = (left, right) if hasattr(left, "__len__") else (right, left)
            self.allowance.make(len(once) * max(0, times) if isinstance(times, int) else 0)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.allowance.make(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            if re.search(r"\d{4}|\*", left):
                raise SecurityError("it pads text to a large width")
            values = right if isinstance(right, tuple) else (right,)
            self.allowance.make(len(left) * max((len(str(value)) for value in values), default=0))
        return super().call_binop(context, operator, left, right)

    def call(*arguments: Any, **named: Any) -> Any:  # self, context, function, and what the function is given
        self, function, given = arguments[0], arguments[2], arguments[3:]
        self.allowance.step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(given) > 1:
            return self.replaced(owner, *given)
        if isinstance(owner, str) and name == "join" and given:
            return self.joined(given[0], owner)
        return ImmutableSandboxedEnvironment.call(*arguments, **named)

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, a step each."""
        for value in values:
            self.allowance.step()
            yield value

    def counted_range(self, *bounds: int) -> range:
        """Python's range, all its steps taken at once."""
        values = range(*bounds)
        self.allowance.step(len(values))
        return values

    def replaced(self, text: str, old: str, new: str, count: int | None = None) -> str:
        """str.replace, and the filter of that name."""
        text, old, new = str(text), str(old), str(new)
        self.allowance.make(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def joined(self, values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
        """str.join, the filter of that name, and the operator ~."""
        pick = (lambda value: value) if attribute is None else (lambda value: self.getitem(value, attribute))
        parts = [str(pick(value)) for value in values]
        self.allowance.make(sum(map(len, parts)) + len(separator) * len(parts))
        return str(separator).join(parts)


class Generation(Extension):
    """`{% generation %}` marks replies for training; here it is what it contains."""

    tags = {"generation"}  # noqa: RUF012 # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Counting(NodeTransformer):
    """Puts every loop and every `~` under the allowance."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "concatenated", [], [], None, None, lineno=node.lineno)


def raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The present local time."""
    return datetime.now().strftime(form[:100])


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
           sort_keys: bool = False) -> str:  # fmt: skip
    """JSON without the HTML escapes of jinja2's own filter."""
    widths = [indent or 0, *(len(text) for text in separators or ())]
    if not all(isinstance(width, int) and 0 <= width <= 16 for width in widths):
        raise SecurityError("it pads text to a large width")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(source: str) -> Program:
    """A template as a function of messages, add_generation_prompt and special tokens.

    Blocks are trimmed, and the same names defined, as by transformers' `apply_chat_template`.

    Raises:
        ChatTemplateError: too long, or not valid. The function raises it for whatever a template does.
    """
    if len(source.encode("utf-8", "replace")) > MOST_TEMPLATE_BYTES:
        raise ChatTemplateError(
            f"the chat template is longer than {MOST_TEMPLATE_BYTES} bytes; export the bundle with a shorter one"
        )
    environment = Sandbox()
    try:
        template = environment.from_string(Counting().visit(environment.parse(source)))
    except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
        raise ChatTemplateError(
            f"the chat template cannot be compiled ({_line(error)}); export the bundle with a valid one"
        ) from None

    def program(messages: list[dict[str, str]], add_generation_prompt: bool, special_tokens: dict[str, str]) -> str:
        allowance = environment.allowance
        allowance.steps = MOST_STEPS
        allowance.characters = MOST_CHARACTERS + 16 * sum(len(text) for m in messages for text in m.values())
        values = {**special_tokens, "messages": messages, "tools": None, "documents": None}
        parts = []
        try:
            for part in template.generate(values, add_generation_prompt=add_generation_prompt):
                allowance.make(len(part))
                parts.append(part)
        except SecurityError as error:
            raise ChatTemplateError(f"the chat template was stopped: {error}; export the bundle with another") from None
        except TemplateError as error:
            raise ChatTemplateError(
                f"the chat template refuses this conversation ({_line(error)}); change its roles or their order"
            ) from None
        except Exception as error:  # a template can raise whatever Python raises
            raise ChatTemplateError(
                f"the chat template failed ({type(error).__name__}: {_line(error)}); export the bundle with another"
            ) from None
        return "".join(parts)

    return program


def _line(error: BaseException) -> str:
    """An error's message on one line, of a length to be read."""
    return " ".join(str(error).split())[:200]
