"""Tokens on their way into a session, a pass at a time: alone, or together with those of other sessions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.compute.several import JointRunner, Run
from kvq.runtime.errors import PromptError

if TYPE_CHECKING:
    from kvq.runtime.policy.features import Seen
    from kvq.runtime.session.session import Session


class Appending:
    """An append that has begun. Until it is done its session is not to be used for anything else.

    A generation yields these where it needs logits, see `generation.events`: who asked for it decides whose passes
    they share.

    Args:
        session: takes the tokens, after its pending ones.
        ids: at least one; None: the pending ones alone, of which there is one at least.
        all_logits, progress: as in `Session.append`.

    Raises:
        PromptError, ContextError, SessionError: as `Session.append`.

    Attributes:
        done, total: tokens stored so far, and all.
        logits: float32 [wanted, vocab], as far as they are known.
    """

    def __init__(
        self,
        session: Session,
        ids: Sequence[int] | np.ndarray | None,
        all_logits: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        session.check_whole()
        pending = np.asarray(session.pending, np.int64)
        new = pending[len(pending) :] if ids is None else session.checked(ids)
        self.session = session
        self._ids = np.concatenate([pending, new]) if len(pending) else new
        self._all, self._progress = all_logits, progress
        wanted = len(new) if all_logits else 1
        self.logits = np.empty((wanted, session.model.architecture.vocab), np.float32)
        self._end = session.store.length + len(self._ids)
        self.done, self.total = 0, len(self._ids)

    @property
    def finished(self) -> bool:
        """Whether all tokens are stored."""
        return self.done == self.total

    @property
    def next(self) -> np.ndarray:
        """The tokens of the next pass, int64, as many as the session takes at a time."""
        return self._ids[self.done : self.done + self.session.most]

    @property
    def result(self) -> np.ndarray:
        """What `Session.append` returns."""
        return self.logits if self._all else self.logits[0]

    def run(self) -> np.ndarray:
        """All that is left, in passes of the session's own; returns `result`."""
        with self.session.exclusive:
            while not self.finished:
                begun, read = time.perf_counter(), self.nbytes
                ids, skip, logits = self._wants()
                self.session.step(ids, self._end, skip, logits)
                self._passed(len(ids), time.perf_counter() - begun, read, 1)
        return self.result

    @property
    def nbytes(self) -> int:
        """Bytes that a pass has to read for it: weights and its cache."""
        return self.session.model.engine.decode_weight_nbytes + self.session.store.used_nbytes

    def wants(self) -> Run:
        """What the next pass is to do for it."""
        session, (ids, skip, logits) = self.session, self._wants()
        store, needs = session.store, session.chooser.needs
        alone = session.runner.run
        return Run(
            *(session.backend, ids, store, session.stepwise, needs, skip, logits),
            lambda: alone(ids, store, needs, skip, logits),
        )

    def take(self, seen: Seen, begun: float, read: int, sessions: int) -> None:
        """Store what a pass over `wants` has seen.

        Args:
            begun: `time.perf_counter()` before the pass.
            read: bytes that it has read.
            sessions: that shared it.
        """
        self.session.take(seen, self._end)
        self._passed(len(seen.ids), time.perf_counter() - begun, read, sessions)

    def failed(self) -> None:
        """The pass over `wants` came to an error, and nothing of it is stored."""

    def _wants(self) -> tuple[np.ndarray, int, np.ndarray]:
        """The next tokens, how many of them nobody wants the logits of, and where those of the others go."""
        ids, first = self.next, self.total - len(self.logits)
        skip = max(0, min(first - self.done, len(ids)))
        at = self.done + skip - first
        return ids, skip, self.logits[at : at + len(ids) - skip]

    def _passed(self, tokens: int, seconds: float, read: int, sessions: int) -> None:
        session = self.session
        clock = session.decode_clock if self.total == 1 else session.prefill_clock
        clock.add(tokens, seconds, read, sessions)
        self.done += tokens
        if self.finished:
            session.last_logits = self.logits[-1].copy() if self._all else self.logits[0]
        if self._progress is not None:
            self._progress(self.done, self.total)


def run_pass(runner: JointRunner, appendings: Sequence[Appending]) -> list[Exception | None]:
    """The next pass of some appends, of different sessions of one model, together.

    Returns:
        Of each, the error that it came to, if any: its session is then as after an append that failed, and the others
        are not harmed.

    Raises:
        PromptError: two of them are of one session.
        SessionError: another thread uses one of them; nothing was done.
    """
    if len({id(appending.session) for appending in appendings}) < len(appendings):
        raise PromptError("a session can be given tokens once a pass; give all of them together")
    with ExitStack() as held:
        for appending in appendings:
            held.enter_context(appending.session.exclusive)
        return _run_held(runner, appendings)


def _run_held(runner: JointRunner, appendings: Sequence[Appending]) -> list[Exception | None]:
    """`run_pass` for sessions that are held."""
    weights = appendings[0].session.model.engine.decode_weight_nbytes if appendings else 0
    read = weights + sum(appending.session.store.used_nbytes for appending in appendings)
    begun = time.perf_counter()
    errors: list[Exception | None] = []
    for appending, seen in zip(appendings, runner.run([each.wants() for each in appendings]), strict=True):
        if isinstance(seen, Exception):
            appending.failed()
            errors.append(seen)
            continue
        try:
            appending.take(seen, begun, read, len(appendings))
            errors.append(None)
        except Exception as error:  # a policy's, a value that cannot be stored: this session's alone
            errors.append(error)
    return errors
