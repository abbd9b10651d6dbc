"""The HTTP application: routes, and the way of a request from its body to its events."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import kvq
from kvq.runtime.errors import ContextError, KvqError, RequestError
from kvq.runtime.server.events import Disconnected, Events, EventStream
from kvq.runtime.server.guard import refusal
from kvq.runtime.server.protocol import Generation, Settings, parse_generation, parse_json
from kvq.runtime.server.responses import Reply
from kvq.runtime.server.scheduler import Event, Job, Scheduler
from kvq.runtime.server.tokens import TokenTexts

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: most bytes of a body.
        body_s: seconds in which a body has to arrive.
        prompt_tokens: most tokens of a prompt; None leaves it to the model's context.
        max_tokens: most tokens of a response, and what a chat response has if the request names no number.
        timeout_s: seconds from the request to the end of its response.
    """

    body: int = 4_000_000
    body_s: float = 30.0
    prompt_tokens: int | None = None
    max_tokens: int = 1024
    timeout_s: float = 600.0


class Api:
    """The endpoints.

    Args:
        scheduler: runs the jobs.
        name: of the model in /v1/models; None takes the bundle's.
        defaults: settings of sessions for requests that name none.
        limits: of requests.
    """

    def __init__(self, scheduler: Scheduler, name: str | None, defaults: Settings, limits: Limits) -> None:
        self.scheduler = scheduler
        self.defaults, self.limits = defaults, limits
        self._name = name
        self._texts: TokenTexts | None = None
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/stats", self.stats, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        """200 once requests can be answered, 503 before and while the server ends."""
        try:
            self.scheduler.ready()
        except RequestError as error:
            return refusal(error, status=error.code)
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        model, _ = self.scheduler.ready()
        return JSONResponse({"object": "list", "data": [self._card(model)]})

    async def model(self, request: Request) -> Response:
        """The one model, by its name."""
        model, _ = self.scheduler.ready()
        self._check_name(model, request.path_params["name"])
        return JSONResponse(self._card(model))

    async def stats(self, request: Request) -> Response:
        """Counts since the start, for operators and benchmarks."""
        _, pool = self.scheduler.ready()
        active, waiting = self.scheduler.counts()
        memory, disk = pool.prefixes.counts()
        return JSONResponse(
            {
                "active": active,
                "waiting": waiting,
                "sessions_in_memory": memory,
                "sessions_on_disk": disk,
                "kv_limit_nbytes": pool.limit,
                "kv_nbytes": pool.known_nbytes,
                "kv_peak_nbytes": pool.peak_nbytes,
                "file_nbytes": pool.prefixes.file_nbytes(),
                "reused": pool.hits,
                "evictions": pool.prefixes.evictions,
                "restores": pool.prefixes.restores,
                "dropped_files": pool.prefixes.dropped_files,
            }
        )

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions."""
        return await self._generate(request, chat=True)

    async def completion(self, request: Request) -> Response:
        """/v1/completions."""
        return await self._generate(request, chat=False)

    def _card(self, model: Model) -> dict[str, Any]:
        shape = model.architecture
        card = {"id": self._model_name(model), "object": "model", "created": self._created, "owned_by": "kvq"}
        return card | {"context_length": shape.context}

    def _model_name(self, model: Model) -> str:
        return self._name or model.bundle.manifest.name

    def _check_name(self, model: Model, name: str | None) -> None:
        served = self._model_name(model)
        if name is not None and name != served:
            raise RequestError(
                f"no model {name!r:.100} here; this server has {served!r}", 404, "model_not_found", "model"
            )

    # -- generation -------------------------------------------------------------------------------

    async def _generate(self, request: Request, chat: bool) -> Response:
        begun = time.monotonic()
        self.scheduler.ready()
        body = await self._body(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:  # called in the worker's thread
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens
                job.cancelled.set()

        # Parsing and tokenizing a long prompt takes long enough to hold up other streams.
        parsed, job, reply = await asyncio.to_thread(self._prepare, body, chat)
        job.deadline = begun + self.limits.timeout_s
        job.emit = emit
        self.scheduler.submit(job)
        request.state.usage = lambda: f"prompt {len(job.ids)} generated {reply.generated}"
        heard = Events(job, events, request)
        try:
            first = await heard.next()
            if isinstance(first[0], BaseException):
                raise first[0]
            if parsed.stream:
                return EventStream(reply, first, heard)
            return JSONResponse(reply.whole(*await heard.rest(first)))
        except BaseException:
            heard.close()
            raise

    def _prepare(self, body: bytes, chat: bool) -> tuple[Generation, Job, Reply]:
        """Everything that can be refused before the queue."""
        model, pool = self.scheduler.ready()
        parsed = parse_generation(parse_json(body), chat, self.defaults)
        self._check_name(model, parsed.model)
        ids, stop, stop_tokens = _prompt(model, parsed)
        context = model.architecture.context
        most_prompt = min(self.limits.prompt_tokens or context, context)
        if len(ids) > most_prompt:
            raise ContextError(f"the prompt has {len(ids)} tokens, at most {most_prompt} are possible; shorten it")
        wanted = self.limits.max_tokens if parsed.max_tokens is None else parsed.max_tokens
        if wanted > self.limits.max_tokens:
            raise RequestError(
                f"max_tokens is at most {self.limits.max_tokens} on this server; ask for less", param="max_tokens"
            )
        max_tokens = min(wanted, context - len(ids) + 1)
        length = min(len(ids) + max_tokens, context)
        capacity = pool.check(parsed.settings, length)
        if self._texts is None:
            self._texts = TokenTexts(model.tokenizer)
        fingerprint = f"kvq-{kvq.__version__}-{model.bundle.manifest.model_digest[:12]}"
        end_tokens = {*stop_tokens, *model.bundle.manifest.eos_token_ids}
        reply = Reply(parsed, self._model_name(model), fingerprint, len(ids), self._texts, end_tokens, bool(stop))
        job = Job(
            ids, parsed.settings, capacity, length, max_tokens, stop, stop_tokens, parsed.sampling,
            parsed.top_logprobs or 0, 0.0, _nowhere,
        )  # fmt: skip
        return parsed, job, reply

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also what keeps a web page from posting here unasked: browsers send JSON only where CORS allows it.
            raise RequestError("send the body with content-type: application/json", 415)
        too_large = RequestError(f"the body is larger than {self.limits.body} bytes; shorten it", 413, "body_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self.limits.body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.body:
                        raise too_large
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {self.limits.body_s:g} s", 408, "timeout") from None
        except ClientDisconnect:
            raise Disconnected from None
        return bytes(body)


def _nowhere(event: Event) -> None:
    """Where a job's events go before anybody listens."""


def _prompt(model: Model, parsed: Generation) -> tuple[np.ndarray, list[str], list[int]]:
    """Token ids int64 [tokens] of the prompt, and what ends the text: strings, ids."""
    stop, stop_tokens = list(parsed.stop), list[int]()
    if parsed.chat:
        template = model.chat_template
        ids = template.encode(parsed.messages)
        stop += template.stop
        stop_tokens += template.stop_tokens
    else:
        ids = model.encode(parsed.prompt) if isinstance(parsed.prompt, str) else parsed.prompt
    if not ids:
        raise RequestError("the prompt has no tokens; give some text", param="messages" if parsed.chat else "prompt")
    array = np.asarray(ids)
    vocab = model.architecture.vocab
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocab:
        raise RequestError(f"token ids must be in [0, {vocab}); is this another model's tokenizer?", param="prompt")
    return array.astype(np.int64), stop, stop_tokens


def make_app(api: Api) -> Starlette:
    """The application without its guard."""

    async def known(request: Request, error: Exception) -> Response:
        return refusal(error)

    async def unknown_path(request: Request, error: Exception) -> Response:
        """What starlette itself refuses: no such path, another method."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        message = "this path takes another method" if status == 405 else "no such path; the API is under /v1"
        return refusal(RequestError(message, status))

    async def unexpected(request: Request, error: Exception) -> Response:
        return refusal(error)  # starlette raises it once more, for the guard's log

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the access log does

    return Starlette(
        routes=api.routes(),
        exception_handlers={
            KvqError: known,
            HTTPException: unknown_path,
            Disconnected: gone,
            Exception: unexpected,
        },
    )
