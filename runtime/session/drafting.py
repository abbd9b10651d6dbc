"""Speculative decoding without a second model: tokens drafted from the text, computed in one pass, taken one by one.

A pass over the next token and the drafted ones behind it (`Drafted`) is stepwise (docs/stepwise.md): each row is what a
single step would give, to the bit, whether other sessions share the pass or not. It changes no store. Its tokens are
stored one by one, as the sampler says them, each with its own row of what the pass has left behind; what the sampler
does not say was never there. So at every token the session is the one that has never drafted, whatever sampler, grammar
or stop string decides, and nothing is ever taken back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.compute.runner import Runner
from kvq.runtime.errors import SamplingError
from kvq.runtime.keywords import is_integer
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.drafted import Drafted, Single
from kvq.runtime.session.lookup import Lookup
from kvq.runtime.session.pace import SIZES, Pace

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session

AUTO, OFF = "auto", "off"
# A draft option as it may be given: "auto", "off", or the most tokens that are drafted at a time.
Draft = str | int | None


class Drafter:
    """Says what a session has to append for its next token, with further ones where the text says which they may be.

    Attributes:
        drafted, accepted: tokens that were computed as drafts, and those of them that were said.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.drafted = self.accepted = 0
        self._lookup, self._pace = Lookup(), Pace()
        self._runners: dict[int, Runner] = {}
        self._known = set[int]()  # sizes of passes that have their buffers
        self._sessions = 1  # that shared the last pass
        self._flight: Drafted | None = None
        self._guess: tuple[int, int, int] | None = None  # place of what a draft would have begun with, agreeing, at
        self._resume: int | None = None  # where the text would go on behind a wrong token

    @property
    def reason(self) -> str:
        """Why this session cannot draft; empty where it can."""
        session = self._session
        if not session.backend.rows_alike:
            return f"{session.backend.name} attention rounds a token among several otherwise than alone"
        if session.store.recent < 1:
            return "it has no recent window"
        if not session.model.engine.rows_alike(session.backend.joins[1]):
            return "the products of this bundle round a token among several otherwise than alone"
        return ""

    def most(self, draft: Draft) -> int | None:
        """Tokens to draft at a time as an option says: None for as many as pay, 0 for none.

        Raises:
            SamplingError: no such option, or a number that this session cannot draft.
        """
        if isinstance(draft, str) and draft.isdecimal() and len(draft) < 10:
            draft = int(draft)
        if draft is None or draft is True or (isinstance(draft, str) and draft == AUTO):
            return 0 if self.reason else None
        if draft is False or (isinstance(draft, str) and draft == OFF):
            return 0
        if not is_integer(draft) or draft < 0:
            raise SamplingError(f'draft must be "auto", "off" or a number of tokens, got {draft!r:.60}')
        if draft and self.reason:
            raise SamplingError(f"this session cannot draft: {self.reason}; leave draft out or set it to off")
        if draft > self._session.store.recent:
            raise SamplingError(
                f"draft must be at most the {self._session.store.recent} tokens of the recent window, got {draft}"
            )
        return int(draft)

    def forget(self) -> None:
        """The session's text is another one now."""
        self._flight = self._guess = self._resume = None
        self._lookup = Lookup()

    def next(self, most: int | None, ahead: int) -> Appending | np.ndarray:
        """What has to be appended for the logits after the token that is pending.

        Or these logits themselves, float32 [vocab], where a pass has computed them along; then the token is stored.

        Args:
            most: as `Drafter.most` gives it.
            ahead: tokens that are wanted after it at most.
        """
        session, flight = self._session, self._flight
        if flight is not None:
            if flight.follows:
                logits = flight.take_row()
                self.accepted += 1
                if flight.taken == len(flight.ids):
                    self._land(flight)
                return logits
            self._land(flight)
        if most == 0 or len(session.pending) != 1:
            return Appending(session, None)
        token = session.pending[0]
        self._check_guess(token)
        if ahead < 1 or self.reason:
            return Appending(session, None)
        ids, place, agreeing = self._draft(token, most, min(ahead, session.room, session.store.recent))
        if len(ids) > 1:
            return Drafted(session, ids, place, agreeing, self._runner, self._passed)
        self._guess = (place, agreeing, len(session.tokens) + 1) if place else None
        return Single(session, self._stepped)

    def _stepped(self, seconds: float, sessions: int) -> None:
        """A single token has been appended."""
        self._sessions = sessions
        self._pace.stepped(seconds if sessions == 1 else None)

    def _passed(self, flight: Drafted) -> None:
        """The pass of a draft has run."""
        size, self._sessions, self._flight = len(flight.ids), flight.sessions, flight
        self.drafted += size - 1
        if flight.sessions == 1:
            if size in self._known:  # the first time it made its buffers, too
                self._pace.passed(size, flight.seconds)
            self._known.add(size)

    def _draft(self, token: int, most: int | None, room: int) -> tuple[list[int], int, int]:
        """Ids of the next pass, and the place they are from."""
        lookup = self._look(token)
        place, agreeing = lookup.find()
        resume, self._resume = self._resume, None
        if not agreeing and resume is not None:
            place = resume
        if not place:
            return [token], 0, 0
        size = self._pace.size(agreeing, room + 1, self._sessions) if most is None else 1 + min(most, room)
        return [token, *lookup.drafts(place, size - 1)], place, agreeing

    def _check_guess(self, token: int) -> None:
        """Learn from a step without a draft."""
        guess, self._guess = self._guess, None
        if guess is None or guess[2] != len(self._session.tokens):
            return
        place, agreeing, _ = guess
        right = self._lookup.tokens[place] == token
        self._pace.guessed(agreeing, right)
        if right or agreeing:  # a replaced token is not the end of a copy; two in a row are
            self._resume = place + 1

    def _look(self, token: int) -> Lookup:
        """The lookup, brought up to a token that comes next."""
        held, known = self._session.tokens, len(self._lookup.tokens)
        said = self._lookup.tokens
        if known > len(held) + 1 or (known and said[-1] != (held[known - 1] if known <= len(held) else token)):
            self._lookup, known = Lookup(), 0
        if known <= len(held):
            self._lookup.extend([*held[known:], token])
        return self._lookup

    def _runner(self, size: int) -> Runner:
        """Runs passes of so many tokens; those of other sizes than the usual are made anew."""
        found = self._runners.get(size)
        if found is None:
            if size not in SIZES:  # of a fixed number: one is kept
                self._runners = {n: runner for n, runner in self._runners.items() if n in SIZES}
            found = self._runners[size] = Runner(self._session.backend, self._session.model.engine, size, stepwise=True)
        return found

    def _land(self, flight: Drafted) -> None:
        """A pass has come to its end: its next token is wrong, or there is none."""
        self._flight, rows = None, flight.taken
        if not rows:  # not even the token that was certain could be stored
            return
        seconds = flight.seconds if flight.sessions == 1 else None
        self._pace.learn(flight.agreeing, len(flight.ids), rows - 1, seconds, flight.sessions)
        if rows < len(flight.ids) and (rows > 1 or flight.agreeing):
            self._resume = flight.place + rows
