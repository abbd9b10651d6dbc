"""A chat's prompt as token ids, and what becomes of it, and of any text, where the context is full."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvq.runtime.server.protocol import Generation
from kvq.runtime.session.generation import GenerationOptions
from kvq.runtime.session.shifting import Shift, of_messages
from kvq.runtime.text.tools import with_tools

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


class Room:
    """How a full context makes room for the texts of a request.

    Args:
        made: whether it does.
        shift: makes what says what stays of a chat; None for a text, of which the sinks stay.
        context: of the model, in tokens.

    Attributes:
        removed: tokens that a chat's prompt was too long by, and whose turns are gone.
    """

    def __init__(self, made: bool, shift: Callable[[], Shift] | None, context: int) -> None:
        self.made, self.removed = made, 0
        self._shift, self._context, self._long = shift, context, list[int]()

    @staticmethod
    def of(request: Generation, model: Model, default: bool) -> Room:
        """That of a request; default: whether room is made where it does not say."""
        made = default if request.context_shift is None else request.context_shift
        context, sink = model.architecture.context, request.settings.sink

        def encode(messages: Sequence[Mapping[str, Any]]) -> list[int]:
            begun = request.begun and messages[-1]["role"] == "assistant"
            return chat_ids(replace(request, messages=[dict(each) for each in messages], begun=begun), model)

        return Room(
            made, partial(of_messages, request.messages, encode, context, sink) if request.chat else None, context
        )

    def prompt(self, ids: list[int]) -> list[int]:
        """A chat's prompt, without its oldest turns where it does not fit."""
        if not self.made or self._shift is None or len(ids) <= self._context:
            return ids
        kept = self._shift()(ids, len(ids), len(ids)).ids
        if len(kept) > self._context:
            return ids  # refused as it is
        self._long, self.removed = ids, len(ids) - len(kept)
        return kept

    def option(self) -> GenerationOptions:
        """The option of one text: each has a state of its own."""
        if not self.made or self._shift is None:
            return {"context_shift": self.made}
        shift = self._shift()
        if self._long:
            shift(self._long, len(self._long), len(self._long))  # these turns are gone
        return {"context_shift": shift}


def chat_ids(request: Generation, model: Model) -> list[int]:
    """Token ids of the conversation, with the tools in the way that the template has for them."""
    template, messages, tools = model.chat_template, request.messages, request.tools
    shown = tools.shown if tools is not None else ()
    spoken = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if not shown and not spoken:
        definitions = None
    elif not template.calls.native:
        messages, definitions = with_tools(template, messages, shown), None
    else:
        definitions = [tool.definition for tool in shown] or None
    if request.begun:
        return template.encode_begun(messages, definitions, request.variables)
    return template.encode(messages, True, definitions, request.variables)
