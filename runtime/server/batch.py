"""Requests from a file, several at a time in one pass, as the server would answer them."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model

URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether it is a chat
CHUNK = 128  # tokens of a prefill chunk, as in the library
PARALLEL = 8  # requests at work where answers do not depend on how many are
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
        parallel: most requests at work at a time; None is `PARALLEL` where no answer depends on it to the bit, else 1.
    """

    name: str | None = None
    settings: Settings = field(default_factory=Settings)
    backend: str | None = None
    max_tokens: int = 1024
    draft: Draft = AUTO
    parallel: int | None = None


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
    load: Callable[[], Model],
    options: Options,
    progress: Callable[[int, int], None],
    log: Callable[[str], None],
    notice: Callable[[str], None],
) -> Summary:
    """Answer every line of a file that has no answer yet.

    Args:
        source: lines {"custom_id", "method", "url", "body"}.
        target: lines {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"} are appended,
            each on disk as soon as it is there; in the order of the source where one is at work at a time.
        load: makes the model, once the files are known to be good.
        options: what else there is to know.
        progress: told lines done and lines in total.
        log: told unexpected errors.
        notice: told in one line what becomes of files of idle sessions.

    Raises:
        BatchError: a line cannot be told from others, or the output is not of this input, model and options.
        KvqError: the model cannot be loaded, or the settings do not fit it.
        OSError: a file cannot be read or written.
    """
    with closing(Requests(source)) as requests, closing(Answers(target, requests)) as answers:
        model = load()
        made_with = {
            "model": model.bundle.manifest.model_digest, "name": served_name(model, options.name),
            "settings": options.settings._asdict(), "backend": options.backend, "max_tokens": options.max_tokens,
        }  # fmt: skip
        answers.check(requests, made_with)
        summary, begun = Summary(skipped=len(answers.marks)), time.monotonic()
        missing = [custom_id for custom_id in requests.numbers if custom_id not in answers.marks]
        with closing(Answerer(model, options, log, notice)) as answerer:
            progress(len(answers.marks), len(requests.numbers))
            for line, values, status, body in answerer.answers(map(requests.read, missing)):
                response = {"status_code": status, "request_id": "req_" + secrets.token_hex(12), "body": body}
                answers.append(
                    {"id": mark(line, made_with), "custom_id": values["custom_id"], "response": response, "error": None}
                )
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
class _Asked:
    """A request at work.

    Attributes:
        line, values: it, as written and as an object.
        prepared, reply: what it comes to, once that is known.
        seed: that it was given, since it names none.
        texts: that have not ended yet.
        events: that have happened.
    """

    line: bytes
    values: dict[str, Any]
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

    Raises:
        KvqError: the settings do not fit the model.
    """

    def __init__(
        self, model: Model, options: Options, log: Callable[[str], None], notice: Callable[[str], None]
    ) -> None:
        self._options, self._log, self._notice = options, log, notice
        self._limits = Limits(max_tokens=options.max_tokens, draft=options.draft)
        self._texts = TokenTexts(model.tokenizer)
        self._served = served_name(model, options.name)
        self.parallel = options.parallel or (PARALLEL if self._alike(model) else 1)
        # The worker's state: None when it is ready, and the error by which it ends.
        states: SimpleQueue[BaseException | None] = SimpleQueue()
        self._states = states
        self._heard = SimpleQueue[tuple[_Asked, Event]]()
        self._scheduler = Scheduler(
            lambda: model, self._make_pool, self.parallel, self.parallel + LEFT, states.put, log
        )
        error = states.get()
        if error is not None:
            raise error

    def _alike(self, model: Model) -> bool:
        """Whether a text is to the bit the same whatever texts share its passes."""
        session = model.session(**self._options.settings._asdict(), backend=self._options.backend)
        return session.backend.rows_alike and model.engine.rows_alike

    def _make_pool(self, model: Model) -> SessionPool:
        pool = SessionPool(model, quarter_of_memory(), None, SESSION_DISK, CHUNK, self._options.backend, self._notice)
        pool.check(self._options.settings, 1)
        pool.check_draft(self._options.settings, self._options.draft)
        return pool

    def close(self) -> None:
        """End the worker; files of idle sessions are gone then."""
        self._scheduler.stop()
        self._scheduler.join()

    def answers(
        self, lines: Iterable[tuple[dict[str, Any], bytes]]
    ) -> Iterator[tuple[bytes, dict[str, Any], int, dict[str, Any]]]:
        """Line, its object, and status and body of the response to it: of each line, as soon as it is there.

        lines: objects that have a custom_id, and as they are written; read no earlier than they are begun.
        """
        most = self.parallel if self.parallel == 1 else self.parallel + AHEAD
        at_work = set[_Asked]()
        left = iter(lines)
        while True:
            while len(at_work) < most and (following := next(left, None)) is not None:
                values, line = following
                try:
                    at_work.add(self._begin(values, line))
                except Exception as error:
                    yield line, values, *self._refused(error)
            if not at_work:
                return
            yield from self._hear(at_work)

    def _hear(self, at_work: set[_Asked]) -> Iterator[tuple[bytes, dict[str, Any], int, dict[str, Any]]]:
        """The next thing that happens; an answer, if that is the end of one."""
        asked, event = self._heard.get()
        if asked not in at_work:
            return  # it has failed before
        if isinstance(event, BaseException):
            for job in asked.prepared.jobs:
                job.cancelled.set()
        else:
            asked.events.append(event)
            asked.texts -= isinstance(event, Step) and event.done is not None
            if asked.texts:
                return
        at_work.remove(asked)
        try:
            if isinstance(event, BaseException):
                raise event
            yield asked.line, asked.values, 200, _body(asked)
        except Exception as error:
            yield asked.line, asked.values, *self._refused(error)

    def _refused(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """Status and body for a request that came to an error."""
        if isinstance(error, RequestError) and error.code == "shutting_down":
            raise self._states.get() or error from None  # the worker is gone: no fault of this line
        if not isinstance(error, KvqError):
            self._log("".join(traceback.format_exception(error)))
        return status_of(error), error_body(error)

    def _begin(self, values: dict[str, Any], line: bytes) -> _Asked:
        """Give a request to the worker."""
        chat, body = _request_of(values)
        seed = None
        if body.get("seed") is None:
            seed = seed_of(values["custom_id"])
            body = {**body, "seed": seed}
        request = parse_generation(body, chat, self._options.settings)
        if request.stream:
            raise RequestError("stream is not for a batch; leave it out", param="stream")
        check_name(self._served, request.model)
        model, pool = self._scheduler.ready()
        prepared = prepare(request, model, pool, self._limits)
        reply = reply_of(prepared, model, self._served, self._texts)
        asked = _Asked(line, values, prepared, reply, seed, len(reply.choices))
        cancelled = threading.Event()  # of its own: a failed request may still be told of
        for job in prepared.jobs:
            job.deadline, job.cancelled = float("inf"), cancelled
            job.emit = partial(self._tell, asked)
        self._scheduler.submit(prepared.jobs)
        return asked

    def _tell(self, asked: _Asked, event: Event) -> None:
        """In the worker's thread: something has happened."""
        self._heard.put((asked, event))


def _body(asked: _Asked) -> dict[str, Any]:
    """The response to a request that has come to its end."""
    answer = asked.reply.whole(asked.events)
    if asked.seed is not None:
        answer["kvq"] = {**(answer["kvq"] or {}), "seed": asked.seed}
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
