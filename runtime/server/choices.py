"""One text of a response on its way: what can be shown of it, which calls it makes, how it ends."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from kvq.runtime.server.jobs import Step
from kvq.runtime.server.preparing import Prepared
from kvq.runtime.server.scheduler import Done
from kvq.runtime.server.tokens import TokenTexts
from kvq.runtime.text.tools import CallReader

CALL_ID = string.ascii_letters + string.digits
CALL_ID_LENGTH = 9  # which is what Mistral's templates ask for; others take any


@dataclass
class Call:
    """A call of a tool: id, name and arguments as JSON text so far."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Piece:
    """What a step adds to a text.

    Attributes:
        text: shown.
        calls: (number of the call, id or "" for one that is known, name, arguments) of what was said of calls.
        released: steps whose log-probabilities can be told.
        finish: why the text ends, in kvq's words or "tool_calls"; None while it goes on.
        done: with the last one.
    """

    text: str = ""
    calls: list[tuple[int, str, str, str]] = field(default_factory=list)
    released: list[Step] = field(default_factory=list)
    finish: str | None = None
    done: Done | None = None


class Choice:
    """A text of a response.

    Args:
        number: among the response's.
        prepared: the request.
        texts: of single tokens.
        reader: tells calls from text; None where there are no tools.

    Attributes:
        generated: tokens so far.
        text: that was shown.
        calls: that were made.
        finish, done: once it has ended.
    """

    def __init__(self, number: int, prepared: Prepared, texts: TokenTexts, reader: CallReader | None) -> None:
        self.number, self.generated, self.text = number, 0, ""
        self.calls: list[Call] = []
        self.finish: str | None = None
        self.done: Done | None = None
        self._ends, self._stops, self._texts, self._reader = prepared.ends, prepared.stops, texts, reader
        self._held: list[tuple[int, Step]] = []  # steps whose text has not been shown: where it begins, in bytes
        self._said = self._shown = 0  # bytes of all tokens, and of the text that was shown

    def take(self, step: Step) -> Piece:
        """What a step adds."""
        piece = Piece(done=step.done)
        self.done = step.done
        response = step.response
        if response is None:  # of a text without tokens
            piece.finish = self.finish = "length"
            return piece
        self.generated += 1
        piece.released = self._released(step)
        piece.finish = response.finish_reason
        if self._reader is None:
            piece.text = response.text
        else:
            said = self._reader.push(response.text) + (self._reader.flush() if response.finish_reason else [])
            for kind, text in said:
                self._add(piece, kind, text)
            if self.calls and piece.finish == "stop":
                piece.finish = "tool_calls"
        self.text += piece.text
        self.finish = piece.finish
        return piece

    def _add(self, piece: Piece, kind: str, text: str) -> None:
        if kind == "text":
            piece.text += text
        elif kind == "call":
            self.calls.append(Call("".join(secrets.choice(CALL_ID) for _ in range(CALL_ID_LENGTH)), text))
            piece.calls.append((len(self.calls) - 1, self.calls[-1].id, text, ""))
        else:
            self.calls[-1].arguments += text
            piece.calls.append((len(self.calls) - 1, "", "", text))

    def _released(self, step: Step) -> list[Step]:
        """Steps whose text is shown, with those held back before: what may be a part of a stop string waits with it."""
        response = step.response
        if response is None:
            return []
        ended = response.token in self._ends
        if not ended:
            self._held.append((self._said, step))
            self._said += self._texts.shown_nbytes(response.token)
        self._shown += len(response.text.encode())
        whole = not self._stops or ended or response.finish_reason not in (None, "stop")
        released = [held for begin, held in self._held if whole or begin < self._shown]
        self._held = [(begin, held) for begin, held in self._held if not whole and begin >= self._shown]
        return released


def choices_of(prepared: Prepared, texts: TokenTexts, reader: Callable[[], CallReader | None]) -> list[Choice]:
    """The texts of a request, in order."""
    count = sum(len(job.options) for job in prepared.jobs)
    return [Choice(number, prepared, texts, reader()) for number in range(count)]
