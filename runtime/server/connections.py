"""Connections, bounded in number and in what they may take before they ask for something.

uvicorn cuts a connection that is idle between requests. One that has just been opened, or sends its headers byte by
byte, or does not read its answer, would stay for ever, and file descriptors are few. What is no HTTP/1.1 it answers in
plain text, if it does not wait for the rest of it.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvq.runtime.errors import RequestError
from kvq.runtime.server.guard import refusal

HEAD_S = 10.0  # from the opening of a connection, or the last answer, to the end of the next request's headers
IDLE_S = 5  # between requests
HEAD_NBYTES = 1 << 16  # of a request's headers
MOST_CONNECTIONS = 256
# File descriptors for all else: the model, session files, the log, libraries.
SPARE_DESCRIPTORS = 96
FEWEST_CONNECTIONS = 16
VERSIONS = (b"1.0", b"1.1")
# What the line in front of a chunk may begin with; its end is not there yet.
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,20}([ \t]*\r?|;[^\n]*)")
LOOKED_AT_NBYTES = 64


def most_connections() -> int:
    """How many may be open at a time: what the process's limit of file descriptors leaves."""
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows has no such limit
        return MOST_CONNECTIONS
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(FEWEST_CONNECTIONS, min(MOST_CONNECTIONS, soft - SPARE_DESCRIPTORS))


class Strict(h11.Connection):
    """h11's reader, which refuses besides what it would answer, or wait for, though it is no HTTP/1.1.

    That is another version; a body whose length is said in two ways, or in chunks before there were any (those who
    stand in front of a server may read it otherwise); a chunk without a size.
    """

    def next_event(self) -> Any:
        """As of h11.

        Raises:
            h11.RemoteProtocolError: what has come is no HTTP/1.1.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            named = {name for name, _ in event.headers}
            chunked = b"transfer-encoding" in named
            if event.http_version not in VERSIONS or (
                chunked and (b"content-length" in named or event.http_version == b"1.0")
            ):
                raise h11.RemoteProtocolError("another version, or a length that is said in two ways")
        elif event is h11.NEED_DATA and self._waits_for_no_chunk():
            raise h11.RemoteProtocolError("no size of a chunk")
        return event

    def _waits_for_no_chunk(self) -> bool:
        """Whether the size of a chunk is waited for, and what there is of it cannot become one."""
        # h11 tells nobody what it waits for. A version of it without these names is one that waits longer.
        reader = getattr(self, "_reader", None)
        if getattr(reader, "_reading_trailer", True) or getattr(reader, "_bytes_in_chunk", 1):
            return False
        begun = self.trailing_data[0][:LOOKED_AT_NBYTES]
        return bool(begun) and not CHUNK_SIZE.fullmatch(begun)


class Connection(H11Protocol):
    """One connection. Where there are too many, the one that has waited longest without a request makes room."""

    most = MOST_CONNECTIONS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = Strict(h11.SERVER, HEAD_NBYTES)
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, and cut another one where there are too many."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) <= self.most:
            return
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        idle = [other for other in others if not other.busy]
        if idle:
            min(idle, key=lambda other: other.since).cut()
        else:
            self._refuse()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._unwatch()

    def cut(self) -> None:
        """Close at once, whatever is still to be sent."""
        self._unwatch()
        self.connections.discard(self)
        self.transport.abort()

    @property
    def since(self) -> float:
        """When it began to wait, by the loop's clock."""
        return 0.0 if self._deadline is None else self._deadline.when()

    def _watch(self) -> None:
        if self.busy:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self.cut)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP/1.1, without a word of it, and close."""
        begun = self.busy and self.cycle.response_started
        path = self.scope["path"] if self.busy else ""
        if self.busy:  # a request whose body is broken: what it asked for has nobody to go to
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer cannot be taken back
            self.transport.close()
            return
        said = (
            f"this is no well-formed HTTP/1.1 request, or its head exceeds {HEAD_NBYTES} bytes; send one, without TLS"
        )
        self._answer(RequestError(said), "Bad Request", path)

    def _refuse(self) -> None:
        """Answer without reading: every connection there is has a request at work."""
        error = RequestError("too many connections are open; try again in a moment", 503, "too_many_connections")
        self._answer(error, "Service Unavailable")

    def _answer(self, error: RequestError, reason: str, path: str = "") -> None:
        """Say an error, in the form of the API that a path is of, and close."""
        response = refusal(error, path)
        headers = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        head = f"HTTP/1.1 {error.status} {reason}\r\n".encode() + headers + b"connection: close\r\n\r\n"
        self.transport.write(head + bytes(response.body))
        self.transport.close()
