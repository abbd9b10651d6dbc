"""Several models behind one address: each is loaded when it is asked for, and closed when room is needed."""

from __future__ import annotations

import asyncio
import difflib
import gc
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvq.runtime.errors import KvqError, RequestError
from kvq.runtime.server.guard import check_content_type, refusal
from kvq.runtime.server.preparing import Limits
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.session.statistics import size

LISTS = ("/v1/models", "/models")
TAGS = ("/api/tags", "/api/ps")
LOAD_S = 600.0
LONGEST_NAME = 256  # that is compared with the names there are


@dataclass(eq=False)
class Member:
    """A model of a fleet.

    Attributes:
        name: in the API.
        nbytes: of its files, about what it takes in memory besides caches.
        context: most tokens of a text.
        asleep: the application where it is not loaded: answers what needs no model, 503 to the rest.
        make: begins to load it: its worker and its application; told what `Scheduler` tells its `on_ready`.
        running: these two while it is loaded; None otherwise.
        loaded: done once it can answer, with the error where it cannot.
        users: requests at work.
        used: `time.monotonic()` of the last one.
    """

    name: str
    nbytes: int
    context: int
    asleep: Starlette
    make: Callable[[Callable[[BaseException | None], None]], tuple[Scheduler, ASGIApp]]
    running: tuple[Scheduler, ASGIApp] | None = None
    loaded: Future[None] | None = None
    users: int = 0
    used: float = 0.0


class Asleep:
    """Stands for the scheduler of a model that is not loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ready(self) -> NoReturn:
        """Raise RequestError, always."""
        raise RequestError(
            f"{self.name} is not loaded, and this request loads nothing; send it a text first", 503, "not_loaded"
        )


@dataclass
class Fleet:
    """The application of several models.

    Attributes:
        members: the first one answers requests that name none.
        limit: most bytes of the models that are loaded; one alone may be larger.
        log: told in one line what is loaded and closed.
        limits: of requests.
    """

    members: Sequence[Member]
    limit: int
    log: Callable[[str], None]
    limits: Limits = field(default_factory=Limits)
    _created: int = field(default_factory=lambda: int(time.time()))
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _stopping: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/health":
            await self._health()(scope, receive, send)
            return
        if scope["method"] == "GET" and path in LISTS:
            await JSONResponse({"object": "list", "data": [self._card(m) for m in self.members]})(scope, receive, send)
            return
        if scope["method"] == "GET" and path in TAGS:
            shown = [m for m in self.members if path == TAGS[0] or m.running is not None]
            await JSONResponse({"models": [self._tag(m) for m in shown]})(scope, receive, send)
            return
        try:
            loads = self._loads(scope)
            asked, receive = await self._asked(scope, receive)
            member = self.named(asked)
            if member.running is None and not loads:
                await self._unloaded(member, scope)(scope, receive, send)
                return
            app = await self._begin(member)
        except KvqError as error:
            await refusal(error, path)(scope, receive, send)
            return
        try:
            await app(scope, receive, send)
        finally:
            member.users -= 1
            member.used = time.monotonic()

    def named(self, name: str | None) -> Member:
        """The member of a name.

        Raises:
            RequestError: 404, with the name that comes close.
        """
        if name is None:
            return self.members[0]
        names = {member.name: member for member in self.members}
        found = names.get(name) or names.get(name.removesuffix(":latest"))
        if found is None:
            near = difflib.get_close_matches(name, names, 1) if len(name) <= LONGEST_NAME else []
            hint = f"did you mean {near[0]!r}?" if near else f"this server has {', '.join(map(repr, names))}"
            raise RequestError(f"no model {name!r:.100} here; {hint}", 404, "model_not_found", "model")
        return found

    def stop(self) -> None:
        """End all of them; any thread, returns at once."""
        self._stopping = True
        for member in self.members:
            if member.running is not None:
                member.running[0].stop()
            if member.loaded is not None:  # who waits for one that is being loaded would wait for all of that
                _fail(member.loaded, RequestError("the server is shutting down", 503, "shutting_down"))

    def join(self, patience_s: float | None = None) -> bool:
        """Wait for all workers after `stop`, as `Scheduler.join`."""
        schedulers = [member.running[0] for member in self.members if member.running is not None]
        return all([scheduler.join(patience_s) for scheduler in schedulers])

    # -- which model --------------------------------------------------------------------------------

    def _loads(self, scope: Scope) -> bool:
        """Whether a request may have a model loaded for it: only one that a web page cannot send unasked may.

        Raises:
            RequestError: 415, of a body that is not said to be JSON.
        """
        matches = [route.matches(scope)[0] for route in self.members[0].asleep.routes]
        if scope["method"] != "POST" or Match.FULL not in matches:
            return False
        check_content_type(Headers(scope=scope))
        return True

    def _unloaded(self, member: Member, scope: Scope) -> ASGIApp:
        """What answers for a model that is not loaded, and stays so."""
        if scope["method"] == "GET" and _named_in(scope["path"]) is not None:
            return JSONResponse(self._card(member))
        return member.asleep

    async def _asked(self, scope: Scope, receive: Receive) -> tuple[str | None, Receive]:
        """The model that a request names, and its body once more for the application, which checks it."""
        if (named := _named_in(scope["path"])) is not None:
            return named, receive
        if scope["method"] != "POST":
            return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("model", [])), None), receive
        body, more = bytearray(), True  # in one piece: a client may send it a byte at a time
        ended: list[Message] = []
        try:
            async with asyncio.timeout(self.limits.body_s):
                while more and len(body) <= self.limits.body:  # the application refuses one that is larger
                    message = await receive()
                    if message["type"] != "http.request":
                        ended.append(message)
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            seconds = f"{self.limits.body_s:g}"
            raise RequestError(f"the body did not arrive within {seconds} s", 408, "timeout") from None
        whole: Message = {"type": "http.request", "body": bytes(body), "more_body": more}
        held = iter([whole, *ended])

        async def again() -> Message:
            return next(held, None) or await receive()

        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        name = (value.get("model") or value.get("name")) if isinstance(value, dict) else None
        return name if isinstance(name, str) else None, again

    # -- loading and closing ------------------------------------------------------------------------

    async def _begin(self, member: Member) -> ASGIApp:
        """Its application, with one user more; loaded if need be."""
        member.users += 1
        try:
            async with self._changing:
                if member.running is None:
                    self._make_room(member)
                    self.load(member)
                running, loaded = member.running, member.loaded
            if loaded is not None:
                async with asyncio.timeout(LOAD_S):
                    await asyncio.shield(asyncio.wrap_future(loaded))
            if running is None:
                raise RequestError("the server is shutting down", 503, "shutting_down")
            return running[1]
        except TimeoutError:
            member.users -= 1
            raise RequestError("the model is being loaded; try again in a moment", 503, "loading") from None
        except BaseException:
            member.users -= 1
            raise

    def load(self, member: Member) -> None:
        """Begin to load a model."""
        if self._stopping:
            return
        loaded: Future[None] = Future()

        def settle(error: BaseException | None) -> None:  # in its worker's thread
            if error is not None:
                member.running = None
            if loaded.done():
                return
            if error is None:
                with suppress(InvalidStateError):  # failed meanwhile, by `stop`
                    loaded.set_result(None)
            else:
                self.log(f"{member.name} cannot be loaded: {error}")
                _fail(loaded, RequestError(f"{member.name} cannot be loaded; the log has why", 500))

        self.log(f"loading {member.name}")
        member.loaded, member.used = loaded, time.monotonic()
        running = member.make(settle)
        if not (loaded.done() and loaded.exception()):  # else it has failed already, and is tried again when asked for
            member.running = running

    def _make_room(self, member: Member) -> None:
        """Close models that nobody uses, the least recently used first, until this one fits.

        Raises:
            RequestError: 503, those that are left are at work.
        """
        while True:
            others = [each for each in self.members if each.running is not None]
            if not others or sum(each.nbytes for each in others) + member.nbytes <= self.limit:
                return
            idle = [each for each in others if not each.users]
            if not idle:
                raise RequestError(
                    f"{member.name} needs {size(member.nbytes)}, and the models at work leave no room of"
                    f" {size(self.limit)}; try again in a moment",
                    503,
                    "models_busy",
                )
            self._close(min(idle, key=lambda each: each.used))

    def _close(self, member: Member) -> None:
        if member.running is None:
            return
        scheduler, member.running, member.loaded = member.running[0], None, None
        scheduler.stop()
        scheduler.join()
        del scheduler
        gc.collect()  # worker, model and application know each other
        self.log(f"closed {member.name}")

    def _health(self) -> Response:
        """200 once a model has been loaded, 503 before and while the server ends."""
        done = any(each.loaded is not None and each.loaded.done() for each in self.members)
        if self._stopping or not done:
            code = "shutting_down" if self._stopping else "loading"
            return refusal(RequestError("no model can answer yet; try again in a moment", 503, code), status=code)
        return JSONResponse({"status": "ok"})

    # -- what it says of them -----------------------------------------------------------------------

    def _card(self, member: Member) -> dict[str, Any]:
        card = {"id": member.name, "object": "model", "created": self._created, "owned_by": "kvq"}
        return card | {"context_length": member.context, "max_model_len": member.context}

    def _tag(self, member: Member) -> dict[str, Any]:
        modified = datetime.fromtimestamp(self._created, UTC).isoformat().replace("+00:00", "Z")
        details = {"format": "kvq", "family": "llama", "families": ["llama"], "parent_model": ""}
        return {
            "name": member.name, "model": member.name, "modified_at": modified, "size": member.nbytes, "digest": "",
            "details": details | {"parameter_size": "", "quantization_level": ""},
        }  # fmt: skip


def _fail(loaded: Future[None], error: RequestError) -> None:
    """Tell those who wait for a model, unless they have been told something."""
    with suppress(InvalidStateError):
        loaded.set_exception(error)


def _named_in(path: str) -> str | None:
    """The model that a path is of: /v1/models/NAME."""
    path = unquote(path)
    return next((path[len(prefix) + 1 :] for prefix in LISTS if path.startswith(prefix + "/")), None)
