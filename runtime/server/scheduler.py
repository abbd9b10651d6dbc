"""The worker: one thread owns the model and takes turns between requests, token by token."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import KvqError, RequestError
from kvq.runtime.server.capacity import Capacity
from kvq.runtime.server.pool import Lease, SessionPool
from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.tokens import Scored, most_likely
from kvq.runtime.session.generation import Response
from kvq.runtime.session.sampling import SamplingOptions
from kvq.runtime.session.statistics import Stats

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


@dataclass(frozen=True)
class Done:
    """What ran for a response. cached: prompt tokens that were not processed again."""

    stats: Stats
    cached: int


@dataclass(frozen=True)
class Step:
    """One generated token.

    alternatives: the most likely tokens in its place, as many as asked for.
    done: with the last token.
    """

    response: Response
    alternatives: list[Scored]
    done: Done | None


Event = Step | BaseException


@dataclass(eq=False)
class Job:
    """A request in the worker's terms.

    Attributes:
        ids: int64 [tokens], the prompt, at least one.
        settings, capacity: of its session, see `SessionPool.check`.
        length: most tokens of prompt and response together.
        max_tokens: most tokens to generate.
        stop, stop_tokens, sampling: as in `Session.generate`.
        alternatives: most likely tokens to report with each token.
        deadline: `time.monotonic()` at which the request is given up.
        emit: told every event, from the worker's thread; the last one is a step with `done` or an error.
        cancelled: set from any thread: nobody waits for the answer any more.
    """

    ids: np.ndarray
    settings: Settings
    capacity: Capacity
    length: int
    max_tokens: int
    stop: list[str]
    stop_tokens: list[int]
    sampling: SamplingOptions
    alternatives: int
    deadline: float
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    lease: Lease | None = None
    responses: Iterator[Response] | None = None


class Scheduler:
    """Loads the model, then runs jobs until it is stopped.

    A round is one decode step of every job that generates, and one prefill chunk of one job that does
    not yet, each of these in turn. So a long prompt delays others by a chunk per token, not by its length.

    Args:
        load: makes the model; called in the worker's thread.
        make_pool: makes the session pool for it.
        concurrency: most jobs at work at a time.
        queue: most jobs that wait for that.
        on_ready: called in the worker's thread when the model is there, with None; with the error where it could not be
            loaded, or where the worker ends by one.
        log: told unexpected errors.
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
        self._stopping = False
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

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            RequestError: 429, the queue is full; 503 as `ready`.
        """
        with self._changed:
            self.ready()
            if len(self._waiting) + len(self._active) >= self.concurrency + self.queue:
                raise RequestError("too many requests are waiting; try again in a moment", 429, "queue_full")
            self._waiting.append(job)
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Jobs at work and waiting."""
        return len(self._active), len(self._waiting)

    def stop(self) -> None:
        """End: jobs fail with 503, as soon as the step at hand is done. Any thread; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the worker after `stop`; the pool's files are gone then."""
        self._thread.join()

    # -- the worker's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.model = self._load()
            self.pool = self._make_pool(self.model)
        except Exception as error:  # whatever it is, the main thread has to hear of it
            self._on_ready(error)
            return
        self._on_ready(None)
        try:
            while self._wait():
                self._round(self.pool)
        except Exception as error:  # no job's fault: a server without its worker must not stay
            self._on_ready(error)
        finally:
            self.stop()
            for job in [*self._active, *self._waiting]:
                job.emit(RequestError("the server is shutting down", 503, "shutting_down"))
            self._active.clear()
            self._waiting.clear()
            self.pool.close()

    def _round(self, pool: SessionPool) -> None:
        self._drop()
        self._admit(pool)
        for job in [job for job in self._active if job.responses is not None]:
            self._guarded(job, self._decode, pool)
        self._prefill_one(pool)

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
        """Give waiting jobs a session, first come first served, as far as there is room."""
        while self._waiting and len(self._active) < self.concurrency:
            job = self._waiting[0]
            try:
                job.lease = pool.begin(job.ids, job.settings, job.capacity, job.length)
            except Exception as error:
                self._fail(job, error)
                continue
            if job.lease is None:
                return
            with self._changed:
                self._active.append(self._waiting.popleft())

    def _prefill_one(self, pool: SessionPool) -> None:
        """One chunk of the next job that is not generating yet."""
        for _ in range(len(self._active)):
            job = self._active[0]
            self._active.rotate(-1)
            if job.responses is None:
                self._guarded(job, self._prefill, pool)
                return

    def _guarded(self, job: Job, step: Callable[[Job, Lease, SessionPool], None], pool: SessionPool) -> None:
        """A step of a job; an error ends this job and no other."""
        if job.lease is None or job.cancelled.is_set():
            return  # cancelled: dropped in the next round
        try:
            step(job, job.lease, pool)
        except Exception as error:
            self._fail(job, error)

    def _prefill(self, job: Job, lease: Lease, pool: SessionPool) -> None:
        done = len(lease.session.tokens)
        chunk = job.ids[done : (done // pool.chunk + 1) * pool.chunk]
        if done + len(chunk) == len(job.ids):
            job.responses = lease.session.generate(
                chunk.tolist(), max_tokens=job.max_tokens, stop=job.stop, stop_tokens=job.stop_tokens, **job.sampling
            )
            self._decode(job, lease, pool, len(chunk))
            return
        pool.room_for(lease, len(chunk))
        lease.session.append(chunk)
        pool.appended(lease)
        pool.keep(lease)

    def _decode(self, job: Job, lease: Lease, pool: SessionPool, tokens: int = 1) -> None:
        if job.responses is None:
            return
        pool.room_for(lease, tokens)
        response = next(job.responses)
        pool.appended(lease)
        logits = lease.session.last_logits  # those the token was drawn from
        alternatives = [] if logits is None else most_likely(logits, job.alternatives)
        if response.finish_reason is None:
            job.emit(Step(response, alternatives, None))
        else:
            self._end(job, Step(response, alternatives, Done(lease.session.stats(), lease.cached)))

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, KvqError):
            self._log("".join(traceback.format_exception(error)))
        self._end(job, error)

    def _end(self, job: Job, event: Event | None) -> None:
        if job.lease is not None and self.pool is not None:
            self.pool.end(job.lease)
            job.lease = job.responses = None
        with self._changed:
            for jobs in (self._active, self._waiting):
                if job in jobs:
                    jobs.remove(job)
        if event is not None:
            job.emit(event)
