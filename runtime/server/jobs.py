"""What a request is to the worker: jobs, and the events that it tells of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvq.runtime.server.capacity import Capacity
from kvq.runtime.server.lease import Lease
from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.texts import Choice, Done
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import GenerationOptions, Response
from kvq.runtime.session.sampling import Scored

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass(frozen=True)
class Step:
    """One generated token.

    choice: of the request's, from 0.
    response: None where no token was asked for.
    alternatives: the most likely tokens in its place, as many as asked for.
    done: with the last token of the choice.
    cache: what `Job.reader` says of the session.
    made: when, in nanoseconds of `time.monotonic_ns`.
    """

    choice: int
    response: Response | None
    alternatives: list[Scored]
    done: Done | None
    cache: dict[str, Any] | None = None
    made: int = field(default_factory=time.monotonic_ns, compare=False)


@dataclass(frozen=True)
class Prompted:
    """The log-probabilities of a prompt's tokens but the first, before any step of these choices.

    choices: the choices of this prompt.
    scored: its tokens.
    alternatives: the most likely ones in their place.
    """

    choices: range
    scored: list[Scored]
    alternatives: list[list[Scored]]


Event = Step | Prompted | BaseException


@dataclass(eq=False)
class Job:
    """A prompt of a request in the worker's terms.

    Attributes:
        ids: int64 [tokens], the prompt, at least one.
        settings, capacity: of its session, see `SessionPool.check`.
        length: most tokens of prompt and response together.
        options: of `Session.generate`, for each text that goes on from the prompt.
        first: number of the first of these choices in the request.
        alternatives: most likely tokens to report with each token.
        scored: report the prompt's own tokens too.
        silent: read the prompt, and generate nothing.
        deadline: `time.monotonic()` at which the request is given up.
        emit: told every event, from the worker's thread; the last one of a choice is a step with `done`, and an error
            is the last one of all.
        cancelled: set from any thread: nobody waits for the answer any more. All jobs of a request share it.
        place: how many places it takes in the queue; of a request's jobs one takes one.
        reader: told number and session of a choice after each of its tokens; what it says goes with the step.
        removed: tokens of the conversation that are not in the prompt, since they did not fit.
        strict: its answer must not depend on what was answered before, see `pool`.
    """

    ids: np.ndarray
    settings: Settings
    capacity: Capacity
    length: int
    options: list[GenerationOptions]
    first: int = 0
    alternatives: int = 0
    scored: bool = False
    silent: bool = False
    deadline: float = 0.0
    emit: Callable[[Event], None] = lambda event: None
    cancelled: threading.Event = field(default_factory=threading.Event)
    place: int = 1
    reader: Callable[[int, Session], dict[str, Any]] | None = None
    removed: int = 0
    strict: bool = True
    lease: Lease | None = None
    reading: Appending | None = None
    choices: list[Choice] | None = None
    prompted: Prompted | None = None


class Work(NamedTuple):
    """What a pass does for a job: for one of its choices, or for its prompt."""

    job: Job
    choice: Choice | None
    appending: Appending
