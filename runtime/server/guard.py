"""What stands before the application: host and key checks, unexpected errors, the access log."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvq.runtime.errors import RequestError
from kvq.runtime.server.refusals import error_body, headers_of, status_of

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def refusal(error: BaseException, path: str = "", **extra: Any) -> Response:
    """An error as a response, in the form of the API that a path is of; extra: further members of the body."""
    body = error_body(error)
    if path.startswith("/api/"):  # ollama's
        body = {"error": body["error"]["message"]}
    return JSONResponse(body | extra, status_of(error), headers_of(error))


class Guard:
    """The outermost layer.

    Args:
        app: what it guards.
        hosts: host names a request may be addressed to; None is any. On loopback this keeps web pages out whose
            own name was made to resolve to this machine (DNS rebinding).
        log: told unexpected errors.
        access_log: told one line per request, without anything the client wrote but the path; None is no log.
        counted: told path and status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] | None,
        log: Callable[[str], None],
        access_log: Callable[[str], None] | None,
        counted: Callable[[str, int], None] | None = None,
    ) -> None:
        self.app, self.counted = app, counted
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.log, self.access_log = log, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun, status = time.monotonic(), 0
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, noted)
        except Exception as error:
            self.log("".join(traceback.format_exception(error)))
            if not status:
                await refusal(error, scope["path"])(scope, receive, noted)
        finally:
            if self.counted is not None:
                self.counted(scope["path"], status)
            if self.access_log is not None:
                # As it came over the wire, percent-encoded: a path cannot forge a line.
                path = scope.get("raw_path", b"?").partition(b"?")[0].decode("ascii", "backslashreplace")[:100]
                who = (scope.get("client") or ("?",))[0]
                usage = state["usage"]() if "usage" in state else ""
                line = f"{who} {scope['method']} {path} {status} {time.monotonic() - begun:.3f} s {usage}"
                self.access_log(line.strip())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "").lower()
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isdecimal() else host
        if self.hosts is not None and name not in self.hosts:
            error = RequestError("this server answers to its own address only; see --host", 403, "host_not_allowed")
            await refusal(error, scope["path"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class KeyCheck:
    """Lets requests with the right bearer token through, and those for /health and for the page, which tells nothing.

    Args:
        app: what it guards.
        key: the token.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are Latin-1 on the wire.
        right = secrets.compare_digest(token.strip().encode("latin-1"), self._expected)
        if (right and scheme.lower() == "bearer") or scope["path"] in ("/health", "/"):
            await self.app(scope, receive, send)
        else:
            error = RequestError(
                "wrong or missing API key; send it as Authorization: Bearer KEY", 401, "invalid_api_key"
            )
            await refusal(error, scope["path"])(scope, receive, send)
