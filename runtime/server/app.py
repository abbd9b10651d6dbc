"""The HTTP application: routes, and the way of a request from its body to its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvq.runtime.errors import KvqError, RequestError
from kvq.runtime.server.answering import reader_of, reply_of
from kvq.runtime.server.asking import Asked, Kept, parse_response
from kvq.runtime.server.choices import Choice, choices_of
from kvq.runtime.server.events import Disconnected, Events, EventStream
from kvq.runtime.server.fields import parse_json
from kvq.runtime.server.guard import check_content_type, refusal
from kvq.runtime.server.information import Information
from kvq.runtime.server.jobs import Event, Step
from kvq.runtime.server.metrics import Metrics
from kvq.runtime.server.ollama import OllamaReply, now, parse_chat, parse_generate
from kvq.runtime.server.outputs import ResponseReply
from kvq.runtime.server.preparing import Limits, Prepared, prepare
from kvq.runtime.server.protocol import Generation, Settings, parse_generation
from kvq.runtime.server.responses import Reply
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.server.tokens import TokenTexts

# A body -> what it asks for; None for nothing.
Parser = Callable[[dict[str, Any], Settings], Generation | None]


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
        self.metrics = Metrics()
        self.information = Information(scheduler, name, limits, self.metrics, self._body)
        self._texts: TokenTexts | None = None
        self._kept = Kept()

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        post = ["POST"]
        routes = self.information.routes()
        for prefix in ("/v1", ""):
            routes.append(Route(f"{prefix}/chat/completions", self.chat, methods=post))
            routes.append(Route(f"{prefix}/completions", self.completion, methods=post))
            routes.append(Route(f"{prefix}/responses", self.respond, methods=post))
            routes.append(Route(f"{prefix}/responses/{{identity}}", self.kept, methods=["GET", "DELETE"]))
        routes.append(Route("/api/chat", self.ollama_chat, methods=post))
        routes.append(Route("/api/generate", self.ollama_generate, methods=post))
        self.metrics.paths = frozenset(route.path for route in routes)
        return routes

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions."""
        return await self._generate(request, lambda body, defaults: parse_generation(body, True, defaults), self._reply)

    async def completion(self, request: Request) -> Response:
        """/v1/completions."""
        return await self._generate(
            request, lambda body, defaults: parse_generation(body, False, defaults), self._reply
        )

    async def respond(self, request: Request) -> Response:
        """/v1/responses."""
        asked: list[Asked] = []

        def parse(body: dict[str, Any], defaults: Settings) -> Generation:
            asked.append(parse_response(body, defaults, self._kept))
            return asked[0].generation

        def make(prepared: Prepared) -> ResponseReply:
            return ResponseReply(asked[0], prepared, self._served(), self._choice(prepared), self._kept.add)

        return await self._generate(request, parse, make)

    async def kept(self, request: Request) -> Response:
        """A response that is kept, by its id: shown, or forgotten."""
        identity = request.path_params["identity"]
        body = self._kept.find(identity)[1]
        if request.method != "DELETE":
            return JSONResponse(body)
        self._kept.remove(identity)
        return JSONResponse({"id": identity, "object": "response.deleted", "deleted": True})

    async def ollama_chat(self, request: Request) -> Response:
        """/api/chat."""
        return await self._generate(request, parse_chat, self._ollama_reply(chat=True))

    async def ollama_generate(self, request: Request) -> Response:
        """/api/generate."""
        return await self._generate(request, parse_generate, self._ollama_reply(chat=False))

    # -- generation -------------------------------------------------------------------------------

    async def _generate(
        self, request: Request, parse: Parser, reply_of: Callable[[Prepared], Reply | OllamaReply | ResponseReply]
    ) -> Response:
        begun = time.monotonic()
        self.scheduler.ready()
        body = await self._body(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        # Parsing and tokenizing a long prompt takes long enough to hold up other streams.
        prepared = await asyncio.to_thread(self._prepare, body, parse)
        if prepared is None:
            return JSONResponse({"model": self._served(), "created_at": now(), "response": "", "done": True,
                                 "done_reason": "load"})  # fmt: skip
        reply = reply_of(prepared)
        cancelled, seen = prepared.jobs[0].cancelled, _Times(self.metrics, begun)

        def emit(event: Event) -> None:  # called in the worker's thread
            seen.note(event)
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens
                cancelled.set()

        for job in prepared.jobs:
            job.deadline, job.emit, job.cancelled = begun + self.limits.timeout_s, emit, cancelled
        self.scheduler.submit(prepared.jobs)
        prompt_tokens = sum(len(job.ids) for job in prepared.jobs)
        self.metrics.prompt_tokens += prompt_tokens
        request.state.usage = lambda: f"prompt {prompt_tokens} generated {sum(c.generated for c in reply.choices)}"
        heard = Events(cancelled, events, len(reply.choices), request)
        try:
            first = await heard.next()
            if isinstance(first[0], BaseException):
                raise first[0]
            if prepared.request.stream:
                return EventStream(reply, first, heard)
            return JSONResponse(reply.whole(await heard.rest(first)))
        except BaseException:
            heard.close()
            raise

    def _prepare(self, body: bytes, parse: Parser) -> Prepared | None:
        """Everything that can be refused before the queue; None where nothing is asked for."""
        model, pool = self.scheduler.ready()
        request = parse(parse_json(body), self.defaults)
        if request is None:
            return None
        self.information.check_name(model, request.model)
        prepared = prepare(request, model, pool, self.limits)
        if self._texts is None:
            self._texts = TokenTexts(model.tokenizer)
        return prepared

    def _served(self) -> str:
        return self.information.served(self.scheduler.ready()[0])

    def _reply(self, prepared: Prepared) -> Reply:
        model, _ = self.scheduler.ready()
        return reply_of(prepared, model, self._served(), self._texts or TokenTexts(model.tokenizer))

    def _ollama_reply(self, chat: bool) -> Callable[[Prepared], OllamaReply]:
        def make(prepared: Prepared) -> OllamaReply:
            return OllamaReply(prepared, self._served(), self._choice(prepared), chat)

        return make

    def _choice(self, prepared: Prepared) -> Choice:
        """The one text of a request."""
        model, _ = self.scheduler.ready()
        texts = self._texts or TokenTexts(model.tokenizer)
        (choice,) = choices_of(prepared, texts, lambda: reader_of(prepared, model))
        return choice

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits."""
        check_content_type(request.headers)
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


class _Times:
    """Takes the times of a request's events into the metrics; in the worker's thread.

    Args:
        metrics: where they go.
        begun: `time.monotonic()` of the request.
    """

    def __init__(self, metrics: Metrics, begun: float) -> None:
        self._metrics, self._begun = metrics, begun
        self._last: dict[int, float] = {}

    def note(self, event: Event) -> None:
        """One event."""
        if not isinstance(event, Step):
            return
        now, metrics = time.monotonic(), self._metrics
        if event.response is not None:
            metrics.generated_tokens += 1
            last = self._last.get(event.choice)
            if last is not None:
                metrics.between.add(now - last)
            elif not self._last:
                metrics.first_token.add(now - self._begun)
            self._last[event.choice] = now
        if event.done is not None:
            metrics.request.add(now - self._begun)
            metrics.cached_tokens += event.done.cached
            metrics.drafted_tokens += event.done.drafted
            metrics.accepted_tokens += event.done.accepted
            if event.done.stats.kv_used_bits is not None:
                metrics.bits.add(event.done.stats.kv_used_bits)


def make_app(api: Api) -> Starlette:
    """The application without its guard."""

    async def known(request: Request, error: Exception) -> Response:
        return refusal(error, request.url.path)

    async def unknown_path(request: Request, error: Exception) -> Response:
        """What starlette itself refuses: no such path, another method."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        message = "no such path; the API is under /v1"
        if request.url.path.startswith("/api/"):
            known = sorted(route.path for route in api.routes() if route.path.startswith("/api/"))
            message = f"no such path; of ollama's API there are {', '.join(known)}, and no others"
        if status == 405:
            message = "this path takes another method"
        return refusal(RequestError(message, status), request.url.path)

    async def unexpected(request: Request, error: Exception) -> Response:
        return refusal(error, request.url.path)  # starlette raises it once more, for the guard's log

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
