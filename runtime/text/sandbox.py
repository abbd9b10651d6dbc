"""Running a chat template: jinja2's immutable sandbox, with its work and the size of what it makes bounded.

jinja2 keeps a template from reaching Python's internals and from changing what it is given. That it
ends, and within a laptop's memory, is seen to here: by counting, so that the same template and the same
messages are refused, or not, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from kvq.runtime.errors import ChatTemplateError
from kvq.runtime.text.allowance import Allowance
from kvq.runtime.text.methods import METHODS, kind_of
from kvq.runtime.text.operations import Operations
from kvq.runtime.text.rewriting import Generation, callable_by_template, counting

MOST_TEMPLATE_BYTES = 1 << 17  # the longest published ones, with tools, take 30 kB

STEPS_OF_A_DATE = 30
MOST_OF_A_FIELD = 256  # characters for one of a form, beyond which Python gives up

# (messages, add_generation_prompt, special tokens, tools and whatever else a template may read, by name) -> text
Program = Callable[[list[dict[str, Any]], bool, dict[str, Any]], str]


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], optimized=False
        )
        self.allowance = Allowance()
        self.operations = Operations(self.allowance)
        self.filters = self.operations.filters()
        self.tests = self.operations.tests()
        self.globals = {
            "range": self.counted_range, "dict": self.made_dict, "namespace": self.made_namespace, "cycler": Cycler,
            "joiner": Joiner, "raise_exception": self.refuse, "strftime_now": self.strftime_now,
        }  # fmt: skip
        self._functions = {id(function) for function in self.globals.values()}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kind = kind_of(obj)
        if kind is not None and callable(value) and attr not in METHODS[kind]:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No wrapper for str.format: it is barred."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.operations.hashed(argument))

    def call_filter(self, name: Any, *given: Any, **named: Any) -> Any:
        """As `map` does, by what a template says."""
        return super().call_filter(self._callable(name), *given, **named)

    def call_test(self, name: Any, *given: Any, **named: Any) -> Any:
        """As `select` and its like do, by what a template says."""
        return super().call_test(self._callable(name), *given, **named)

    def _callable(self, name: Any) -> str:
        if not callable_by_template(name):
            raise SecurityError("it names no filter or test by what it calls one")
        return str(name)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.operations.before(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(*arguments: Any, **named: Any) -> Any:  # self, context, function, and what the function is given
        self, function, given = arguments[0], arguments[2], arguments[3:]
        self.allowance.step(20 + len(given) + len(named))
        # Not of a namespace, which has any attribute that a template gives it.
        owner = function.__self__ if isinstance(function, BuiltinMethodType | MethodType) else None
        if kind_of(owner) is not None:
            for scope in ("_loop_vars", "_block_vars"):  # jinja2's own, for functions that want the context
                named.pop(scope, None)
            return self.operations.method(owner, function.__name__, given, named)
        if isinstance(owner, LoopContext):  # changed() compares
            self.allowance.weigh(*given)
        elif not (
            isinstance(function, Macro | LoopContext | Joiner | Undefined)
            or isinstance(owner, Cycler)
            or id(function) in self._functions  # a tuple in itself takes for ever to hash
        ):
            raise SecurityError(f"it calls a {type(function).__name__}")
        return ImmutableSandboxedEnvironment.call(*arguments, **named)

    def counted_range(self, *bounds: int) -> range:
        """Python's range, all its steps taken at once."""
        values = range(*bounds)
        self.allowance.step(2 * len(values))
        return values

    def made_dict(self, *given: Any, **named: Any) -> dict[Any, Any]:
        """Python's dict."""
        self.allowance.weigh(*given)
        self.allowance.step(10 * len(named))
        for pair in (pair for pairs in given if isinstance(pairs, list | tuple) for pair in pairs):
            if isinstance(pair, list | tuple) and pair:
                self.operations.hashed(pair[0])
        return dict(*given, **named)

    def made_namespace(self, *given: Any, **named: Any) -> Namespace:
        """jinja2's namespace."""
        return Namespace(self.made_dict(*given, **named))

    def refuse(self, message: Any) -> None:
        """How a template refuses a conversation."""
        raise TemplateError(self.operations.text(message))

    def strftime_now(self, form: str) -> str:
        """The present local time."""
        self.allowance.step(STEPS_OF_A_DATE)
        self.allowance.make(MOST_OF_A_FIELD * min(len(form), 100))  # a field may have a width
        return datetime.now().strftime(form[:100])


def compiled(source: str) -> Program:
    """A template as a function of messages, add_generation_prompt, and values by name.

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
        template = environment.from_string(counting(environment.parse(source)))
    except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
        raise ChatTemplateError(
            f"the chat template cannot be compiled ({_line(error)}); export the bundle with a valid one"
        ) from None

    def program(messages: list[dict[str, Any]], add_generation_prompt: bool, names: dict[str, Any]) -> str:
        values = {"tools": None, "documents": None, **names, "messages": messages}
        try:
            environment.allowance.begin(messages, names)
            return "".join(template.generate(values, add_generation_prompt=add_generation_prompt))
        except SecurityError as error:
            raise ChatTemplateError(
                f"the chat template was stopped: {_line(error)}; export the bundle with another"
            ) from None
        except TemplateError as error:
            raise ChatTemplateError(
                f"the chat template refuses this conversation ({_line(error)}); change its roles or their order"
            ) from None
        except Exception as error:  # a template can raise whatever Python raises
            raise ChatTemplateError(
                f"the chat template failed ({type(error).__name__}: {_line(error)}); export the bundle with another"
            ) from None

    return program


def _line(error: BaseException) -> str:
    """An error's message on one line, of a length to be read."""
    return " ".join(str(error).split())[:200]
