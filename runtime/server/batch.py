"""Requests from a file, several at a time in one pass, as the server would answer them."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvq.runtime.errors import KvqError, RequestError
from kvq.runtime.server.answering import check_name, reply_of, served_name
from kvq.runtime.server.batchfiles import Answers, Requests, mark
from kvq.runtime.server.capacity import quarter_of_memory
from kvq.runtime.server.fields import Fields
from kvq.runtime.server.jobs import Event, Step
from kvq.runtime.server.pool import SessionPool
from kvq.runtime.server.preparing import Limits, Prepared, prepare
from kvq.runtime.server.protocol import Settings, parse_generation
from kvq.runtime.server.refusals import error_body, status_of
from kvq.runtime.server.responses import Reply
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.server.tokens import TokenTexts
from kvq.runtime.session.drafting import AUTO, Draft
from kvq.runtime.session.several import texts_at_a_time

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model

URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether it is a chat
CHUNK = 128  # tokens of a prefill chunk, as in the library
AHEAD = 2  # requests that wait for one of these to end, so that none is waited for
LEFT = 8  # prompts of a request that failed may be in the queue still
SESSION_DISK = 1_000_000_000
SEED_NBYTES = 4


@dataclass(frozen=True)
class Options:
    """What answers depend on beside their line and the model.

    Attributes:
        name: of the model in requests and responses; None takes the bundle's.
        settings, backend: of sessions.
        max_tokens: most of a response, and what a chat has if the request names no number.
        draft: as in `Session.generate`; no answer depends on it.
        parallel: most requests at work at a time; None is `texts_at_a_time`.
    """

    name: str | None = None
    settings: Settings = field(default_factory=Settings)
    backend: str | None = None
    max_tokens: int = 1024
    draft: Draft = AUTO
    parallel: int | None = None


class Asked(NamedTuple):
    """A line of the input.

    values: its object, which has a custom_id.
    line: it, as written.
    """

    values: dict[str, Any]
    line: bytes


class Answer(NamedTuple):
    """The response to a line."""

    asked: Asked
    status: int
    body: dict[str, Any]


class Answering(Protocol):
    """What answers requests, some at a time: in this process, or on the nodes of a cluster.

    Attributes:
        digest: of the model.
        served: its name.
    """

    digest: str
    served: str

    def answers(self, lines: Iterable[Asked]) -> Iterator[Answer]:
        """The answer to each line, as soon as it is there; lines are read no earlier than they are begun."""
        ...

    def close(self) -> None:
        """Let go of what answers them."""
        ...


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        answered: lines, in this run.
        failed: those of them that were answered by an error.
        skipped: lines that had an answer before.
        prompt_tokens, generated: tokens of those answered.
        seconds: of all of it, without loading the model.
    """

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    seconds: float = 0.0


def answer_file(
    source: Path,
    target: Path,
    begin: Callable[[], Answering],
    options: Options,
    progress: Callable[[int, int], None],
) -> Summary:
    """Answer every line of a file that has no answer yet.

    Args:
        source: lines {"custom_id", "method", "url", "body"}.
        target: lines {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"} are appended,
            each on disk as soon as it is there; in the order of the source where one is at work at a time.
        begin: makes what answers them, once the files are known to be good.
        options: what answers depend on beside the model.
        progress: told lines done and lines in total.

    Raises:
        BatchError: a line cannot be told from others, or the output is not of this input, model and options.
        KvqError: what `begin` raises.
        OSError: a file cannot be read or written.
    """
    with closing(Requests(source)) as requests, closing(Answers(target, requests)) as answers:
        summary = Summary()
        with closing(begin()) as answering:
            begun = time.monotonic()
            made_with = {
                "model": answering.digest, "name": answering.served, "settings": options.settings._asdict(),
                "backend": options.backend, "max_tokens": options.max_tokens,
            }  # fmt: skip
            answers.check(requests, made_with)
            summary.skipped = len(answers.marks)
            missing = [custom_id for custom_id in requests.numbers if custom_id not in answers.marks]
            progress(len(answers.marks), len(requests.numbers))
            for asked, status, body in answering.answers(Asked(*requests.read(each)) for each in missing):
                response = {"status_code": status, "request_id": "req_" + secrets.token_hex(12), "body": body}
                values = {"custom_id": asked.values["custom_id"], "response": response, "error": None}
                answers.append({"id": mark(asked.line, made_with), **values})
                progress(len(answers.marks), len(requests.numbers))
                summary.answered += 1
                summary.failed += status != 200
                usage = body.get("usage", {})
                summary.prompt_tokens += usage.get("prompt_tokens", 0)
                summary.generated += usage.get("completion_tokens", 0)
    summary.seconds = time.monotonic() - begun
    return summary


def seed_of(custom_id: str) -> int:
    """The seed of a request that names none: the first four bytes of its custom_id's SHA-256."""
    digest = hashlib.sha256(custom_id.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:SEED_NBYTES], "big")


@dataclass(eq=False)
class _Begun:
    """A request at work.

    Attributes:
        asked: its line.
        prepared, reply: what it comes to, once that is known.
        seed: that it was given, since it names none.
        texts: that have not ended yet.
        events: that have happened.
    """

    asked: Asked
    prepared: Prepared
    reply: Reply
    seed: int | None
    texts: int
    events: list[Event] = field(default_factory=list)


class Answerer:
    """Answers requests by the server's worker and pool, some at a time. Close it after use.

    Args:
        model: the loaded model.
        options: what answers depend on beside it.
        log, notice: as in `answer_file`.

    Attributes:
        parallel: most requests at work.
        most: of them, and of those that wait for one to end.
        digest, served: as in `Answering`.

    Raises:
        KvqError: the settings do not fit the model.
    """

    def __init__(
        self, model: Model, options: Options, log: Callable[[str], None], notice: Callable[[str], None]
    ) -> None:
        self._options, self._log, self._notice = options, log, notice
        self._limits = Limits(max_tokens=options.max_tokens, draft=options.draft)
        self._texts = TokenTexts(model.tokenizer)
        self.digest, self.served = model.bundle.manifest.model_digest, served_name(model, options.name)
        session = model.session(**options.settings._asdict(), backend=options.backend)
        self.parallel = options.parallel or texts_at_a_time(session)
        self.most = self.parallel if self.parallel == 1 else self.parallel + AHEAD
        self._at_work = set[_Begun]()
        # The worker's state: None when it is ready, and the error by which it ends.
        states: SimpleQueue[BaseException | None] = SimpleQueue()
        self._states = states
        self._heard = SimpleQueue[tuple[_Begun, Event]]()
        self._scheduler = Scheduler(
            lambda: model, self._make_pool, self.parallel, self.parallel + LEFT, states.put, log
        )
        error = states.get()
        if error is not None:
            raise error

    def _make_pool(self, model: Model) -> SessionPool:
        pool = SessionPool(model, quarter_of_memory(), None, SESSION_DISK, CHUNK, self._options.backend, self._notice)
        pool.check(self._options.settings, 1)
        pool.check_draft(self._options.settings, self._options.draft)
        return pool

    def close(self) -> None:
        """End the worker; files of idle sessions are gone then."""
        self._scheduler.stop()
        self._scheduler.join()

    def answers(self, lines: Iterable[Asked]) -> Iterator[Answer]:
        """As in `Answering`."""
        left, at_work = iter(lines), 0
        while True:
            new = list(islice(left, self.most - at_work))
            at_work += len(new)
            if not at_work:
                return
            for answer in self.step(new):
                at_work -= 1
                yield answer

    def step(self, lines: Sequence[Asked]) -> list[Answer]:
        """Begin these, and wait until one of those at work has an answer; all that are there by then."""
        found: list[Answer] = []
        for asked in lines:
            try:
                self._at_work.add(self._begin(asked))
            except Exception as error:
                found.append(self._refused(asked, error))
        while self._at_work and (not found or not self._heard.empty()):
            found += self._hear()
        return found

    def _hear(self) -> list[Answer]:
        """The next thing that happens; an answer, if that is the end of one."""
        begun, event = self._heard.get()
        if begun not in self._at_work:
            return []  # it has failed before
        if isinstance(event, BaseException):
            for job in begun.prepared.jobs:
                job.cancelled.set()
        else:
            begun.events.append(event)
            begun.texts -= isinstance(event, Step) and event.done is not None
            if begun.texts:
                return []
        self._at_work.remove(begun)
        try:
            if isinstance(event, BaseException):
                raise event
            return [Answer(begun.asked, 200, _body(begun))]
        except Exception as error:
            return [self._refused(begun.asked, error)]

    def _refused(self, asked: Asked, error: Exception) -> Answer:
        """What a request is told that came to an error."""
        if isinstance(error, RequestError) and error.code == "shutting_down":
            raise self._states.get() or error from None  # the worker is gone: no fault of this line
        if not isinstance(error, KvqError):
            self._log("".join(traceback.format_exception(error)))
        return Answer(asked, status_of(error), error_body(error))

    def _begin(self, asked: Asked) -> _Begun:
        """Give a request to the worker."""
        chat, body = _request_of(asked.values)
        seed = None
        if body.get("seed") is None:
            seed = seed_of(asked.values["custom_id"])
            body = {**body, "seed": seed}
        request = parse_generation(body, chat, self._options.settings)
        if request.stream:
            raise RequestError("stream is not for a batch; leave it out", param="stream")
        check_name(self.served, request.model)
        model, pool = self._scheduler.ready()
        prepared = prepare(request, model, pool, self._limits)
        reply = reply_of(prepared, model, self.served, self._texts)
        begun = _Begun(asked, prepared, reply, seed, len(reply.choices))
        cancelled = threading.Event()  # of its own: a failed request may still be told of
        for job in prepared.jobs:
            job.deadline, job.cancelled = float("inf"), cancelled
            job.emit = partial(self._tell, begun)
        self._scheduler.submit(prepared.jobs)
        return begun

    def _tell(self, begun: _Begun, event: Event) -> None:
        """In the worker's thread: something has happened."""
        self._heard.put((begun, event))


def _body(begun: _Begun) -> dict[str, Any]:
    """The response to a request that has come to its end."""
    answer = begun.reply.whole(begun.events)
    if begun.seed is not None:
        answer["kvq"] = {**(answer["kvq"] or {}), "seed": begun.seed}
    return answer


def _request_of(values: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether a line asks for a chat, and its body."""
    fields = Fields(values)
    fields.take("custom_id")
    method, url, body = fields.text("method"), fields.text("url"), fields.object("body")
    fields.done()
    if method != "POST":
        raise RequestError("method must be POST", param="method")
    if url not in URLS:
        raise RequestError(f"url must be {' or '.join(URLS)}", 404, param="url")
    if body is None:
        raise RequestError("body is missing; give it", param="body")
    return URLS[url], body
