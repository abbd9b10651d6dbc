"""Where the turns of a conversation stand in its session, and how a session's metadata keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvq.runtime.errors import PromptError
from kvq.runtime.session.header import MOST_TOKENS

# Where `Session.metadata`, and so a saved session, holds the conversation.
KEY = "chat"


@dataclass
class Turn:
    """A question and its reply, as places in the session.

    Attributes:
        start: tokens cached before the question; None if the template has rewritten earlier turns for it.
        pending: `Session.pending` before the question.
        prompt: tokens cached when the reply began; 0 where it does not stand there any more.
        document: characters of the question that were read ahead of it, see `Conversation.read`.
        read: tokens cached when they had been read, and what is left of them after `undo`.
    """

    start: int | None
    pending: list[int]
    prompt: int
    document: int = 0
    read: int = 0


@dataclass
class Document:
    """The beginning of a question that has been read while the rest is not known: a turn left open.

    Attributes:
        text: of it.
        start: tokens cached before it.
        pending: `Session.pending` before it.
    """

    text: str
    start: int = 0
    pending: list[int] = field(default_factory=list)


def to_metadata(
    messages: list[dict[str, str]], turns: list[Turn], document: Document | None, identity: str
) -> dict[str, Any]:
    """JSON values that `from_metadata` reads; identity: as `identity_of` says it."""
    rows: list[list[Any]] = []
    for turn in turns:
        ahead = [turn.document, turn.read] if turn.document else []
        rows.append([turn.start, turn.pending, turn.prompt, *ahead])
    kept: dict[str, Any] = {"messages": messages, "turns": rows, "written_with": identity}
    if document is not None:
        kept["document"] = dict(vars(document))
    return kept


def identity_of(template: str, special_tokens: Mapping[str, str], eos_token_ids: Sequence[int]) -> str:
    """sha256 of what turns a conversation into tokens beside the tokenizer, and ends its replies."""
    parts = [template, sorted(special_tokens.items()), sorted(eos_token_ids)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_identity(data: Any, identity: str) -> None:
    """Raise PromptError for a conversation that was written with something else; files of before do not say."""
    if isinstance(data, Mapping) and data.get("written_with", identity) != identity:
        raise PromptError(
            "the session's conversation was written with another chat template, or other special tokens or end ids,"
            " than the bundle has now; load it with the bundle it was made with, or begin a new one"
        )


def from_metadata(data: Any, tokens: int, vocab: int) -> tuple[list[dict[str, str]], list[Turn], Document | None]:
    """Messages, turns and open document from a session's metadata, which may come from anybody's file."""
    try:
        messages = [{"role": _text(m["role"]), "content": _text(m["content"])} for m in data["messages"]]
        turns = [
            Turn(None if start is None else _place(start), [_place(token) for token in pending], *map(_place, places))
            for start, pending, *places in data["turns"]
        ]
        roles = [message["role"] for message in messages]
        if roles != ["system"] * (len(roles) % 2) + ["user", "assistant"] * len(turns):
            raise ValueError(f"roles {roles}")
        document = None
        if "document" in data:
            kept = data["document"]
            document = Document(_text(kept["text"]), _place(kept["start"]), [_place(id) for id in kept["pending"]])
            if not document.text.strip():
                raise ValueError("an empty document")
        _check_places(
            turns, document, [len(message["content"]) for message in messages[len(messages) % 2 :: 2]], tokens
        )
        pending = [token for part in (*turns, document) if part is not None for token in part.pending]
        if not all(0 <= token < vocab for token in pending):
            raise ValueError("ids outside the vocabulary")
    except (KeyError, TypeError, ValueError) as error:
        raise PromptError(
            f"the session's conversation is damaged ({type(error).__name__}: {error!s:.100}); begin a new one"
        ) from None
    return messages, turns, document


def _place(value: Any) -> int:
    """A place in the session, or an id, as the file has it."""
    if type(value) is not int or not 0 <= value < MOST_TOKENS:
        raise ValueError(f"a place or an id is {value!r:.40}")
    return value


def _text(value: Any) -> str:
    """A text that UTF-8 can encode, as the file has it."""
    if type(value) is not str:
        raise ValueError(f"a text is {value!r:.40}")
    value.encode()
    return value


def _check_places(turns: list[Turn], document: Document | None, lengths: list[int], tokens: int) -> None:
    """Raise ValueError for places that do not follow each other, or lie beyond the tokens of the session."""
    places = [0]
    for turn in turns:
        if turn.start is not None:
            places += [turn.start, *([turn.read] if turn.document else []), turn.prompt]
    if document is not None:
        places.append(document.start)
    if places != sorted(places) or places[-1] > tokens or any(turn.prompt > tokens for turn in turns):
        raise ValueError(f"turns at {places} of {tokens} tokens")
    if not all(0 <= turn.document <= length for turn, length in zip(turns, lengths, strict=True)):
        raise ValueError("documents longer than the questions they are in")
