"""A scheduler without HTTP, and what the library alone says to the same."""

from __future__ import annotations

import contextlib
import functools
import queue
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from kvq.runtime.server.jobs import Job
from kvq.runtime.server.pool import SessionPool
from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.scheduler import Scheduler

CHUNK = 16
KINDS = [
    Settings("fp16"),
    Settings("int4"),
    Settings("mixed", recent=4, sink=2),
    Settings("rule"),
    Settings("random", kv_bits=8.0),
    Settings("k8v4", recent=0),
]


class Runner:
    """A scheduler over a model; `all_nbytes` are the bytes of all sessions after each step, counted from outside."""

    def __init__(self, model, limit=None, disk=10**9, concurrency=4, waiting=64, chunk=CHUNK) -> None:
        self.log: list[str] = []
        self._place = tempfile.TemporaryDirectory()  # where no killed server has left anything
        ready = threading.Event()

        def make_pool(model):
            self.pool = SessionPool(model, limit, Path(self._place.name), disk, chunk, None, self.log.append)
            return self.pool

        self.scheduler = Scheduler(
            lambda: model, make_pool, concurrency, waiting, lambda error: ready.set(), self.log.append
        )
        ready.wait()
        self.all_nbytes: list[int] = []
        self.order: list[Job] = []
        self.gate = threading.Event()
        self.gate.set()

    def start(self, ids, kind=KINDS[0], tokens=8, seed=1, deadline=1e9, strict=True, n=1, **sampling):
        events = queue.Queue()

        def emit(event):
            self.all_nbytes.append(self.pool.nbytes())
            self.order.append(job)
            events.put(event)
            self.gate.wait(120)

        length = len(ids) + tokens
        job = Job(
            np.asarray(ids, np.int64), kind, self.pool.check(kind, length, n), length,
            [{"max_tokens": tokens, "temperature": 1.0, "seed": seed + i, **sampling} for i in range(n)],
            deadline=time.monotonic() + deadline, emit=emit, strict=strict,
        )  # fmt: skip
        self.scheduler.submit([job])
        job.events = events
        return job

    @contextlib.contextmanager
    def held(self):
        """Inside the block the worker stands still, so what is started there is started at once."""
        self.gate.clear()
        first = self.start([1], tokens=1)
        first.events.get(timeout=120)
        yield
        self.order.clear()
        self.gate.set()

    def finish(self, job):
        """(tokens, what `Done` says of cached tokens)"""
        tokens = []
        while True:
            event = job.events.get(timeout=120)
            if isinstance(event, BaseException):
                raise event
            tokens.append(event.response.token)
            if event.done is not None:
                return tokens, event.done.cached

    def finish_all(self, job):
        """The tokens of every text."""
        texts, left = [[] for _ in job.options], len(job.options)
        while left:
            event = job.events.get(timeout=120)
            if isinstance(event, BaseException):
                raise event
            texts[event.choice].append(event.response.token)
            left -= event.done is not None
        return texts

    def run(self, *arguments, **options):
        return self.finish(self.start(*arguments, **options))

    def close(self):
        self.scheduler.stop()
        self.scheduler.join()
        self._place.cleanup()


def alone(model, ids, kind=KINDS[0], tokens=8, seed=1):
    """The same response by the library alone: the prompt appended chunk by chunk, then decoded."""
    session = blank(model, kind).fork()
    for at in range(0, len(ids), CHUNK):
        session.append(ids[at : at + CHUNK])
    return [r.token for r in session.generate(None, max_tokens=tokens, temperature=1.0, seed=seed)]


@functools.cache
def blank(model, kind):
    """An empty session; a budget takes a second to make for some policies."""
    return model.session(kind.policy, recent=kind.recent, sink=kind.sink, kv_bits=kind.kv_bits, prefill_chunk=CHUNK)


def text(seed, length):
    return np.random.default_rng(seed).integers(1, 500, length).tolist()
