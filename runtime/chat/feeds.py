"""How a question gets into the cache: only what follows the last reply, wherever the chat template allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvq.runtime.chat.turns import Document, Turn
from kvq.runtime.text.continuing import decoded_behind
from kvq.runtime.text.template import REPLY, ChatTemplate

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass(frozen=True)
class Feed:
    """How a question gets into the cache.

    Attributes:
        length: tokens of the cache that stay.
        pending: of `Session.pending`, what stays.
        ids: what is appended.
        rewritten: whether the template has changed what precedes, so that part of it is processed again.
    """

    length: int
    pending: list[int]
    ids: list[int]
    rewritten: bool = False

    def leading(self, chunk: int) -> int:
        """How many tokens of a long question go ahead in whole chunks, with a look at `cancelled` after each."""
        return (len(self.ids) - 1) // chunk * chunk


class Said(NamedTuple):
    """A reply as it stands in the session.

    shown: ids of its tokens that were shown.
    text: what they say.
    beyond: the text of those behind them: of an end-of-turn token above all, of what a stop string has cut, or of
        bytes of a character that the end has cut.
    """

    shown: list[int]
    text: str
    beyond: str


def said(session: Session, turn: Turn, reply: str, start: int, pending: list[int]) -> Said:
    """The reply of a turn as it stands before `start` and in `pending`.

    Args:
        session: that holds it.
        turn: where.
        reply: what was shown of it.
        start: length of the session, in tokens, that counts.
        pending: ids behind that.
    """
    ids = [*session.tokens[turn.prompt : start], *pending]
    tokenizer, before = session.model.tokenizer, session.tokens[: turn.prompt]
    shown = len(ids)
    while not reply.startswith(text := decoded_behind(tokenizer, before, ids[:shown])):
        shown -= 1
    beyond = decoded_behind(tokenizer, [*before, *ids[:shown]], ids[shown:]) if shown < len(ids) else ""
    return Said(ids[:shown], text, beyond)


def feed_of(
    session: Session, messages: list[dict[str, str]], turns: list[Turn], document: Document | None, question: str
) -> Feed:
    """What to append for a question.

    Args:
        session: that holds the messages.
        messages: {"role", "content"} each, before the question.
        turns: where they stand.
        document: that the question begins with; then as if nothing of it had been cached.
        question: text of the next turn.

    Raises:
        ChatTemplateError: the template refuses the conversation.
    """
    template, asked = session.model.chat_template, {"role": "user", "content": question}
    start, pending = len(session.tokens), session.pending
    if document is not None:
        start, pending = document.start, document.pending
    if turns and start and turns[-1].prompt:
        rest = _after_last_reply(template, messages, asked)
        if rest is not None:
            return _behind_reply(session, turns[-1], messages[-1]["content"], start, pending, rest)
    ids = template.encode([*messages, asked])
    same = 0 if document else min(shared(session.tokens, ids), len(ids) - 1)
    return Feed(same, [], ids[same:], rewritten=bool(turns))


def _after_last_reply(template: ChatTemplate, messages: list[dict[str, str]], question: dict[str, str]) -> str | None:
    """The text between the last reply and the next, with guards; None if the template rewrites what precedes.

    That may be the reply itself: some templates leave out its reasoning once another question follows.
    """
    *before, reply = messages
    prompt = template.render_guarded(before)
    text = template.render_guarded([*before, {**reply, "content": REPLY}, question])
    if not text.startswith(prompt):
        return None
    kept = text.replace(REPLY, template.guarded(reply["content"]))
    if "".join(kept.split()) != "".join(template.render_guarded([*messages, question]).split()):
        return None
    blank, found, rest = text[len(prompt) :].partition(REPLY)
    return rest if found and not blank.strip() and rest else None


def _behind_reply(session: Session, turn: Turn, reply: str, start: int, pending: list[int], rest: str) -> Feed:
    """How `rest` follows the cached reply, of which the model may have said more than was shown; else as `said`."""
    shown, text, beyond = said(session, turn, reply, start, pending)
    rest = reply[len(text) :] + rest
    if not beyond.strip("\ufffd"):
        length, kept = start, list(pending)
    elif rest.startswith(beyond) and len(rest) > len(beyond):
        length, kept, rest = start, list(pending), rest[len(beyond) :]
    elif turn.prompt + len(shown) >= start:  # not cached yet, so there is nothing to take out of the cache
        length, kept = start, shown[start - turn.prompt :]
    else:
        length, kept = turn.prompt + len(shown), []
    held = kept or session.tokens[:length]
    ids = session.model.chat_template.encode_guarded(rest, beginning=False, before=held[-1] if held else None)
    return Feed(length, kept, ids)


def shared(first: Sequence[int], *others: Sequence[int]) -> int:
    """How many ids all begin with."""
    most = min(map(len, (first, *others)))
    return next((at for at in range(most) if any(other[at] != first[at] for other in others)), most)
