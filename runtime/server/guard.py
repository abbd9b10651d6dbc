"""What stands before the application: host and key checks, unexpected errors, the access log."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvq.runtime.errors import RequestError
from kvq.runtime.server.refusals import error_body, headers_of, status_of

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
RESPONSES = "/responses/"  # an id follows, of these characters the log has as many as this:
ID_SHOWN = len("resp_1234")


def refusal(error: BaseException, path: str = "", **extra: Any) -> Response:
    """An error as a response, in the form of the API that a path is of; extra: further members of the body."""
    body = error_body(error)
    if path.startswith("/api/"):  # ollama's
        body = {"error": body["error"]["message"]}
    return JSONResponse(body | extra, status_of(error), headers_of(error))


def check_content_type(headers: Headers) -> None:
    """Raise RequestError for a body that is not said to be JSON.

    Also what keeps a web page from posting here unasked: browsers send JSON only where CORS allows it. Some clients
    name no kind at all; a page's request without one says where it comes from.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    browser = "origin" in headers or "sec-fetch-site" in headers
    if kind != "application/json" and (kind or browser):
        raise RequestError("send the body with content-type: application/json", 415)


def own_names() -> set[str]:
    """What this machine is called by others in its network."""
    found = {socket.gethostname().lower(), socket.getfqdn().lower()}
    bare = {name.removesuffix(".local") for name in found if name}
    return bare | {f"{name}.local" for name in bare}


def _is_address(host: str) -> bool:
    """An IP address, which no name server can make another one."""
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True


def _logged(scope: Scope) -> str:
    """A request's path as the log has it.

    Percent-encoded, as it came over the wire: a path cannot forge a line. Of the id of a kept response the beginning:
    whoever has all of it may read what was said.
    """
    before, named, identity = scope["path"].partition(RESPONSES)
    if len(identity) > ID_SHOWN:
        return quote(before + named + identity[:ID_SHOWN])[:100] + "..."
    return scope.get("raw_path", b"?").partition(b"?")[0].decode("ascii", "backslashreplace")[:100]


class Guard:
    """The outermost layer.

    Args:
        app: what it guards.
        hosts: host names a request may be addressed to; None is any. This keeps web pages out whose own name was made
            to resolve to this machine (DNS rebinding).
        log: told unexpected errors.
        access_log: told one line per request, without anything the client wrote but the path; None is no log.
        counted: told path and status of every answer.
        addresses: any IP address is fine as a host, too.
        origins: whose web pages may send requests, "*" is all; None does not ask where a request comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] | None,
        log: Callable[[str], None],
        access_log: Callable[[str], None] | None,
        counted: Callable[[str, int], None] | None = None,
        *,
        addresses: bool = False,
        origins: Iterable[str] | None = None,
    ) -> None:
        self.app, self.counted, self.addresses = app, counted, addresses
        self.origins = None if origins is None else set(origins)
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
                who = (scope.get("client") or ("?",))[0]
                usage = state["usage"]() if "usage" in state else ""
                line = (
                    f"{who} {scope['method'][:20]} {_logged(scope)} {status} {time.monotonic() - begun:.3f} s {usage}"
                )
                self.access_log(line.strip())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if not self._addressed(headers.get("host", "").lower()):
            said = "this server answers to its own address only; see --host, and --api-key for other names"
            error = RequestError(said, 403, "host_not_allowed")
        elif self._foreign(scope["method"], headers):
            said = "web pages from elsewhere may not ask this server; --cors-origin URL lets those of one in"
            error = RequestError(said, 403, "origin_not_allowed")
        else:
            await self.app(scope, receive, send)
            return
        await refusal(error, scope["path"])(scope, receive, send)

    def _addressed(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isdecimal() else host
        return self.hosts is None or name in self.hosts or (self.addresses and _is_address(name))

    def _foreign(self, method: str, headers: Headers) -> bool:
        """Whether a browser says that a page of another site sends this, and not a user who follows a link."""
        if self.origins is None or headers.get("sec-fetch-site", "").lower() != "cross-site":
            return False
        if method == "GET" and headers.get("sec-fetch-mode", "").lower() == "navigate":
            return headers.get("sec-fetch-dest", "document").lower() != "document"  # in a frame of that page
        return not ("*" in self.origins or headers.get("origin") in self.origins)


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
