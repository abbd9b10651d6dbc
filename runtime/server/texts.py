"""What the worker has at work: texts, and counts of the passes that they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import Response

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass(eq=False)
class Choice:
    """A text at work.

    Attributes:
        number: in the request.
        session: its own.
        events: of its generation, see `kvq.runtime.session.generation.events`.
        appending: what has to be appended for the next token.
    """

    number: int
    session: Session
    events: Iterator[Appending | Response]
    appending: Appending | None = None


@dataclass
class Passes:
    """Counts of passes since the start. sessions: that took part, added up; rows: tokens that they read."""

    passes: int = 0
    sessions: int = 0
    rows: int = 0
