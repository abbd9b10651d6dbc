"""The worker: one thread owns the model and takes turns between requests, token by token."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import KvqError, RequestError
from kvq.runtime.server.jobs import Event, Job, Prompted, Step, Work
from kvq.runtime.server.lease import PIECE, Lease
from kvq.runtime.server.pool import SessionPool
from kvq.runtime.server.texts import Choice, Done, Passes
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import Response, events
from kvq.runtime.session.sampling import Scored, log_probability, most_likely

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


class Scheduler:
    """Loads the model, then runs jobs until it is stopped.

    A round is one pass: the next token of every text that is being generated, and as many tokens of prompts as a chunk
    has, of the jobs that read one, in turn. So a long prompt delays others by a chunk a token, not by its length, and a
    short one does not wait for it; sessions join and leave at any pass.

    Args:
        load: makes the model; called in the worker's thread.
        make_pool: makes the session pool for it.
        concurrency: most jobs at work at a time.
        queue: most jobs that wait for that.
        on_ready: called in the worker's thread when the model is there, with None; with the error where it could not be
            loaded, or where the worker ends by one.
        log: told unexpected errors.

    Attributes:
        passes: that have run.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        make_pool: Callable[[Model], SessionPool],
        concurrency: int,
        queue: int,
        on_ready: Callable[[BaseException | None], None],
        log: Callable[[str], None],
    ) -> None:
        self.model: Model | None = None
        self.pool: SessionPool | None = None
        self.concurrency, self.queue = concurrency, queue
        self._load, self._make_pool, self._on_ready, self._log = load, make_pool, on_ready, log
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: deque[Job] = deque()
        self.passes = Passes()
        self._stopping = False
        self._loading_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvq-worker", daemon=True)
        self._thread.start()

    def ready(self) -> tuple[Model, SessionPool]:
        """Model and pool.

        Raises:
            RequestError: 503, the model is being loaded or the server ends.
        """
        if self._stopping:
            raise RequestError("the server is shutting down", 503, "shutting_down")
        if self.model is None or self.pool is None:
            raise RequestError("the model is being loaded; try again in a moment", 503, "loading")
        return self.model, self.pool

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the jobs of a request into the queue.

        Raises:
            RequestError: 429, the queue is full; 503 as `ready`.
        """
        with self._changed:
            self.ready()
            places = sum(job.place for job in (*self._waiting, *self._active))
            if places >= self.concurrency + self.queue:
                raise RequestError("too many requests are waiting; try again in a moment", 429, "queue_full")
            self._waiting += jobs
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Jobs at work and waiting."""
        return len(self._active), len(self._waiting)

    def stop(self) -> None:
        """End: jobs fail with 503, as soon as the step at hand is done. Any thread; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, patience_s: float | None = None) -> bool:
        """Wait for the worker after `stop`; the pool's files are gone then.

        Args:
            patience_s: a worker that still loads, which nothing can interrupt, has no pool and will make none: it is
                waited for no longer than so many seconds. None waits for it to the end.

        Returns:
            whether it has ended. A process with one that has not must end by `os._exit`: onnxruntime may crash where
            its threads are at work while it is taken down.
        """
        if not self._loading_ended.wait(patience_s):
            return False
        self._thread.join()
        return True

    # -- the worker's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                model = self._load()
            finally:
                self._loading_ended.set()
            if self._stopping:  # asked after that is set: whoever does not wait for us has asked us to stop before
                return
            self.pool = self._make_pool(model)
            self.model = model
        except Exception as error:  # whatever it is, the main thread has to hear of it
            if not self._stopping:  # one who was told to end, as the child of a load by the same Ctrl-C, has not failed
                self._on_ready(error)
            return
        self._on_ready(None)
        try:
            while self._wait():
                self._round(self.pool, self.model)
        except Exception as error:  # no job's fault: a server without its worker must not stay
            self._on_ready(error)
        finally:
            self.stop()
            for job in [*self._active, *self._waiting]:
                job.emit(RequestError("the server is shutting down", 503, "shutting_down"))
            self._active.clear()
            self._waiting.clear()
            self.pool.close()

    def _round(self, pool: SessionPool, model: Model) -> None:
        self._drop()
        self._admit(pool)
        work = [*self._texts(), *self._prompts(pool)]
        if not work:
            return
        appends = [(job.lease, each.session, len(each.next)) for job, _, each in work if job.lease is not None]
        pool.room_for(appends)
        self.passes.passes += 1
        self.passes.sessions += len(work)
        self.passes.rows += sum(tokens for _, _, tokens in appends)
        errors = model.run_pass([each.appending for each in work])
        for (job, choice, appending), error in zip(work, errors, strict=True):
            if job.lease is None:
                continue  # another text of it has failed, or taken it to its end
            if error is not None:
                self._fail(job, error)
                continue
            pool.appended(job.lease)
            if appending.finished:
                self._guarded(job, self._read if choice is None else partial(self._say, choice), pool)

    def _texts(self) -> list[Work]:
        """The next token of every text."""
        return [
            Work(job, choice, choice.appending)
            for job in self._active
            for choice in job.choices or ()
            if choice.appending is not None
        ]

    def _prompts(self, pool: SessionPool) -> list[Work]:
        """The next tokens of prompts, in turn: a chunk's length of them in all, fewer where texts wait for them."""
        work: list[Work] = []
        busy = any(job.choices for job in self._active)
        room = min(PIECE, pool.chunk) if busy else pool.chunk
        for _ in range(len(self._active)):
            job = self._active[0]
            if job.choices is None and job.lease is not None:
                if job.reading is None:
                    ids = job.lease.following(pool.chunk, busy)
                    job.reading = Appending(job.lease.session, ids, all_logits=job.scored)
                tokens = len(job.reading.next)
                if work and tokens > room:
                    break  # it is the first one of the next pass
                room -= tokens
                work.append(Work(job, None, job.reading))
            self._active.rotate(-1)
        return work

    def _wait(self) -> bool:
        """Wait for work; False when it is time to end."""
        with self._changed:
            while not (self._stopping or self._waiting or self._active):
                self._changed.wait()
            return not self._stopping

    def _drop(self) -> None:
        """Let go of jobs that nobody waits for, or that took too long."""
        now = time.monotonic()
        for jobs in (self._active, self._waiting):
            for job in list(jobs):
                if job.cancelled.is_set():
                    self._end(job, None)
                elif now > job.deadline:
                    self._end(job, RequestError("the request took too long; ask for fewer tokens", 503, "timeout"))

    def _admit(self, pool: SessionPool) -> None:
        """Give waiting jobs a session, first come first served, as far as there is room.

        One whose prompt begins as another's that is being read waits until that is past it, and goes on from there.
        """
        for job in list(self._waiting):
            if len(self._active) >= self.concurrency:
                return
            if not job.scored and pool.awaits(job.ids, job.settings, job.capacity, job.strict):
                continue
            try:
                job.lease = pool.begin(
                    job.ids, job.settings, job.capacity, job.length, len(job.options), job.scored, job.strict
                )
            except Exception as error:
                self._fail(job, error)
                continue
            if job.lease is None:
                return
            with self._changed:
                self._waiting.remove(job)
                self._active.append(job)

    def _guarded(self, job: Job, step: Callable[[Job, Lease, SessionPool], None], pool: SessionPool) -> None:
        """A step of a job; an error ends this job and no other."""
        if job.lease is None or job.cancelled.is_set():
            return  # cancelled: dropped in the next round
        try:
            step(job, job.lease, pool)
        except Exception as error:
            self._fail(job, error)

    def _read(self, job: Job, lease: Lease, pool: SessionPool) -> None:
        """A chunk of a prompt is read; with the last one comes the first token of each choice."""
        session, reading = lease.session, job.reading
        if reading is None:
            return
        job.reading = None
        if job.scored:
            self._score(job, reading.logits, len(session.tokens) - reading.total)
        pool.keep(lease)
        if len(session.tokens) < len(job.ids):
            return
        if job.prompted is not None:
            job.emit(job.prompted)
        if job.silent:
            for number in range(job.first, job.first + len(job.options)):
                job.emit(Step(number, None, [], Done(session.stats(), lease.cached)))
            self._end(job, None)
            return
        sessions = [session, *(pool.fork(lease) for _ in job.options[1:])]
        for each in sessions if job.removed else ():
            each.shifts.add(job.removed)
        job.choices = [
            Choice(job.first + i, each, events(each, None, **options))
            for i, (each, options) in enumerate(zip(sessions, job.options, strict=True))
        ]
        for choice in list(job.choices):
            self._say(choice, job, lease, pool)

    def _score(self, job: Job, logits: np.ndarray, done: int) -> None:
        """Log-probabilities of the tokens that follow on a chunk's.

        logits: float32 [chunk, vocab]; done: tokens before the chunk.
        """
        if job.prompted is None:
            job.prompted = Prompted(range(job.first, job.first + len(job.options)), [], [])
        for row, token in zip(logits, job.ids[done + 1 : done + 1 + len(logits)].tolist(), strict=False):
            job.prompted.scored.append(Scored(token, log_probability(row, token)))
            job.prompted.alternatives.append(most_likely(row, job.alternatives))

    def _say(self, choice: Choice, job: Job, lease: Lease, pool: SessionPool) -> None:
        """The tokens of a choice whose logits are there, drafted ones too, up to what has to be appended next."""
        choice.appending = None
        response = next(choice.events)
        while not isinstance(response, Appending):
            following = self._told(choice, response, job, lease, pool)
            if following is None:
                return
            response = following
        choice.appending = response
        pool.appended(lease)

    def _told(
        self, choice: Choice, response: Response, job: Job, lease: Lease, pool: SessionPool
    ) -> Appending | Response | None:
        """Tell of a token; what comes after it, None for nothing."""
        logits = choice.session.last_logits  # those the token was drawn from
        alternatives = [] if logits is None else most_likely(logits, job.alternatives)
        cache = None if job.reader is None else job.reader(choice.number, choice.session)
        done = following = None
        if response.finish_reason is None:
            following = next(choice.events)
        elif job.choices is not None:
            done = choice.done(lease.cached)
            pool.keep_answer(lease, choice.session)
            job.choices.remove(choice)
            if choice.session is not lease.session:
                lease.sessions.remove(choice.session)
            if not job.choices:
                self._end(job, Step(choice.number, response, alternatives, done, cache))
                return None
        job.emit(Step(choice.number, response, alternatives, done, cache))
        return following

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, KvqError):
            self._log("".join(traceback.format_exception(error)))
        self._end(job, error)

    def _end(self, job: Job, event: Event | None) -> None:
        if job.lease is not None and self.pool is not None:
            self.pool.end(job.lease)
            job.lease = job.choices = job.reading = None
        with self._changed:
            for jobs in (self._active, self._waiting):
                if job in jobs:
                    jobs.remove(job)
        if event is not None:
            job.emit(event)
