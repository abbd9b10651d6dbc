"""A pass over a token and drafted ones behind it: an append of the one, with rows that are taken as they are said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvq.runtime.compute.runner import Runner
from kvq.runtime.compute.several import Run
from kvq.runtime.policy.features import Seen
from kvq.runtime.session.appending import Appending

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


class Single(Appending):
    """An append of the token that is pending, alone.

    Args:
        session: has one pending token.
        passed: told what the pass took in seconds, and how many sessions shared it.
    """

    def __init__(self, session: Session, passed: Callable[[float, int], None]) -> None:
        super().__init__(session, None)
        self._told = passed

    def _passed(self, tokens: int, seconds: float, read: int, sessions: int) -> None:
        super()._passed(tokens, seconds, read, sessions)
        self._told(seconds, sessions)


class Drafted(Appending):
    """An append of the token that is pending; its pass computes drafted tokens along, of which nothing is stored yet.

    Args:
        session: has one pending token.
        ids: that one and the drafted ones.
        place, agreeing: as of `Lookup.find`.
        runner: gives what runs a pass of so many tokens of this session alone.
        passed: told of the pass, before its first token is stored.

    Attributes:
        at: tokens of the session before it.
        taken: tokens of it that have been stored.
        seconds, sessions: that its pass took, and that shared it.
    """

    def __init__(
        self,
        session: Session,
        ids: list[int],
        place: int,
        agreeing: int,
        runner: Callable[[int], Runner],
        passed: Callable[[Drafted], None],
    ) -> None:
        super().__init__(session, None)
        self.ids, self.place, self.agreeing = ids, place, agreeing
        self.at, self.taken = len(session.tokens), 0
        self.seconds, self.sessions = 0.0, 1
        self.logits = np.empty((len(ids), session.model.architecture.vocab), np.float32)
        self._runner, self._told = runner, passed
        self._pairs = frozenset(session.store.pairs)
        self._seen: Seen | None = None

    @property
    def next(self) -> np.ndarray:
        return np.asarray(self.ids, np.int64)

    @property
    def follows(self) -> bool:
        """Whether the session has come to the next of its tokens, just as it was drafted."""
        session, row = self.session, self.taken
        came = len(session.tokens) == self.at + row
        return came and 0 < row < len(self.ids) and session.pending == [self.ids[row]]

    def run(self) -> np.ndarray:
        with self.session.exclusive:
            begun, read = time.perf_counter(), self.nbytes
            try:
                seen = self._alone()
            except BaseException:
                self.failed()
                raise
            self.take(seen, begun, read, 1)
        return self.result

    def _alone(self) -> Seen:
        session, runner = self.session, self._runner(len(self.ids))
        runner.timer = session.timer
        return runner.run(self.next, session.store, session.chooser.needs, 0, self.logits)

    def wants(self) -> Run:
        session = self.session
        wanted = (self.next, session.store, True, session.chooser.needs, 0, self.logits)
        return Run(session.backend, *wanted, self._alone)

    def take(self, seen: Seen, begun: float, read: int, sessions: int) -> None:
        session = self.session
        session.store.release(self._pairs)
        if not session.backend.rows_alike:  # a precision turned up that another backend computes
            session.step(self._ids, self._end, 0, self.logits[:1])
            self._passed(1, time.perf_counter() - begun, read, sessions)
            return
        self.seconds, self.sessions = time.perf_counter() - begun, sessions
        self._seen = seen._replace(residual=seen.residual.copy())  # a pass of other sessions has the same buffer
        self._told(self)
        self.take_row(self.seconds, read)
        self.done = 1

    def failed(self) -> None:
        self.session.store.release(self._pairs)

    def take_row(self, seconds: float = 0.0, read: int = 0) -> np.ndarray:
        """Store the next token; the logits after it, float32 [vocab].

        seconds, read: that its pass took and the bytes it read, with the first one.
        """
        if self._seen is None:
            raise RuntimeError("a drafted token is taken before its pass has run")
        session, begun = self.session, time.perf_counter()
        with session.exclusive:
            session.take(_row(self._seen, self.taken), session.store.length + 1)
            session.last_logits = logits = self.logits[self.taken].copy()
        session.decode_clock.add(1, seconds + time.perf_counter() - begun, read, self.sessions)
        self.taken += 1
        return logits


def _row(seen: Seen, row: int) -> Seen:
    """What a pass of one token would have left behind."""
    at = slice(row, row + 1)
    found: dict[str, Any] = {name: None if part is None else part[at] for name, part in seen._asdict().items()}
    for name in ("keys", "values"):
        found[name] = np.ascontiguousarray(getattr(seen, name)[:, :, at])
    return Seen(**found)
