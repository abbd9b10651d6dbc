"""What the worker has at work: texts, and counts of the passes that they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import Response
from kvq.runtime.session.statistics import Stats

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass(frozen=True)
class Done:
    """What ran for a choice.

    cached: prompt tokens that were not processed again; drafted, accepted: its own, as of `Drafter`.
    """

    stats: Stats
    cached: int
    drafted: int = 0
    accepted: int = 0


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
    _before: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.session.drafter.drafted, self.session.drafter.accepted

    def done(self, cached: int) -> Done:
        """What ran for it; cached: as of `Done`."""
        drafted, accepted = self._before
        drafter = self.session.drafter
        return Done(self.session.stats(), cached, drafter.drafted - drafted, drafter.accepted - accepted)


@dataclass
class Passes:
    """Counts of passes since the start. sessions: that took part, added up; rows: tokens that they read."""

    passes: int = 0
    sessions: int = 0
    rows: int = 0
