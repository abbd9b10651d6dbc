"""The reply that a conversation is giving: one at a time, and at any time its message has what it has said."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from kvq.runtime.errors import PromptError
from kvq.runtime.session.exclusive import in_use
from kvq.runtime.session.generation import Progress, Response

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation

F = TypeVar("F", bound=Callable[..., Any])


class OneReply:
    """Which reply of a conversation can be gone on with: the one that was asked for last.

    It is held weakly: one that nobody has any more is closed at once, and keeps no session in memory.
    """

    def __init__(self) -> None:
        self._replies: weakref.ref[Generator[Response, None, None]] | None = None
        self._asked: object = None

    def of(self, steps: Generator[Response, None, None]) -> Generator[Response, None, None]:
        """These steps, which `end` ends."""
        self._asked = object()
        replies = self._given(self._asked, steps)
        self._replies = weakref.ref(replies)
        return replies

    def _given(self, asked: object, steps: Generator[Response, None, None]) -> Generator[Response, None, None]:
        if asked is not self._asked:  # it was to follow on what may be gone, and has changed nothing yet
            raise PromptError("the conversation has gone on since this reply was asked for; ask for it again")
        yield from steps

    def end(self) -> None:
        """Close the reply where it stands; one that has not begun yet is refused when it does.

        Raises:
            SessionError: it is being computed; nothing was done.
        """
        self._asked = None
        replies = None if self._replies is None else self._replies()
        if replies is None or inspect.getgeneratorstate(replies) == inspect.GEN_CREATED:
            return
        try:
            replies.close()
        except ValueError:  # it runs in another thread, or has called what calls this
            raise in_use() from None


def ends_reply(method: F) -> F:
    """A decorator for what goes on with a conversation: it ends the reply that is being given, and is done alone."""

    @functools.wraps(method)
    def alone(conversation: Conversation, *arguments: Any, **named: Any) -> Any:
        with conversation.session.exclusive:
            conversation.one_reply.end()
            return method(conversation, *arguments, **named)

    return alone  # type: ignore[return-value]


def telling(conversation: Conversation, responses: Iterator[Response]) -> Generator[Response, None, None]:
    """Pass responses on; what one says is in the last message, and in the session's metadata, before it is passed on.

    So a session can be saved and forked between two, and nothing is left to do when a reply that was left is closed,
    which may be late: its variable may live on, and an event loop closes it when it gets to it.
    """
    *before, last = conversation.messages
    message, text, conversation.lost = {**last}, last["content"], 0
    conversation.messages = [*before, message]
    for response in responses:
        text += response.text
        message["content"] = text[conversation.lost :]
        if not response.index:  # the metadata holds this very message from here on
            conversation.remember()
        yield response


def behind(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part of the tokens, as that of all of them."""
    return None if progress is None else lambda done, _: progress(min(before + done, total), total)
