"""Connections, bounded in number and in what they may take before they ask for something.

uvicorn cuts a connection that is idle between requests. One that has just been opened, or sends its headers byte by
byte, or does not read its answer, would stay for ever, and file descriptors are few.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from kvq.runtime.errors import RequestError
from kvq.runtime.server.refusals import RETRY_AFTER_S, error_body

HEAD_S = 10.0  # from the opening of a connection, or the last answer, to the end of the next request's headers
IDLE_S = 5  # between requests
HEAD_NBYTES = 1 << 16  # of a request's headers
MOST_CONNECTIONS = 256
# File descriptors for all else: the model, session files, the log, libraries.
SPARE_DESCRIPTORS = 96
FEWEST_CONNECTIONS = 16


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


class Connection(H11Protocol):
    """One connection. Where there are too many, the one that has waited longest without a request makes room."""

    most = MOST_CONNECTIONS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
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

    def _refuse(self) -> None:
        """Answer without reading: every connection there is has a request at work."""
        error = RequestError("too many connections are open; try again in a moment", 503, "too_many_connections")
        body = json.dumps(error_body(error)).encode()
        head = (
            f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"retry-after: {RETRY_AFTER_S}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
