"""The events of jobs on the way to its client: heard as long as the client is there, streamed or collected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvq.runtime.server.jobs import Event, Step

SEND_S = 60.0  # seconds a client may take to accept a part of a stream


class Disconnected(Exception):
    """The client has gone."""


async def until_gone(request: Request, then: Callable[[], None]) -> None:
    """Wait until a client goes away, whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    then()


class Events:
    """The events of a request's jobs. When the client goes away, the worker drops them at its next step.

    Args:
        cancelled: drops them.
        queue: where their events arrive, in the event loop's thread.
        texts: how many texts are to come to their end.
        request: the client's; its body has been read.
    """

    def __init__(self, cancelled: threading.Event, queue: asyncio.Queue[Event], texts: int, request: Request) -> None:
        self._cancelled, self._queue, self._open = cancelled, queue, texts
        self._watch = asyncio.ensure_future(until_gone(request, self._gone))

    def _gone(self) -> None:
        self._cancelled.set()
        self._queue.put_nowait(Disconnected())

    async def next(self) -> list[Event]:
        """All events that have come meanwhile, at least one; an error is the last one.

        Raises:
            Disconnected: the client is gone.
        """
        events = [await self._queue.get()]
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        for event in events:
            if isinstance(event, Disconnected):
                raise event
        return events

    async def rest(self, events: list[Event]) -> list[Event]:
        """All events to the end, these first; raises the error if one comes instead."""
        found: list[Event] = []
        while True:
            for event in events:
                if isinstance(event, BaseException):
                    raise event
                found.append(event)
            if self.ended(events):
                self.close()
                return found
            events = await self.next()

    def ended(self, events: list[Event]) -> bool:
        """Count the texts that end with these events; whether all have."""
        self._open -= sum(isinstance(event, Step) and event.done is not None for event in events)
        return self._open <= 0

    def close(self) -> None:
        """Nobody listens any more."""
        self._cancelled.set()
        self._watch.cancel()


class StreamedReply(Protocol):
    """What a response says, in the form of its API."""

    media_type: str

    def opening(self) -> bytes:
        """Before the first event."""

    def frames(self, events: Sequence[Event]) -> bytes:
        """Of events, of which none is an error."""

    def ending(self) -> bytes:
        """After the last one."""

    def failure(self, error: BaseException) -> bytes:
        """An error in place of what is left."""


class EventStream(Response):
    """A job's events as they come. An error after the first one is the last event of the stream."""

    def __init__(self, reply: StreamedReply, first: list[Event], heard: Events) -> None:
        super().__init__(media_type=reply.media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._reply, self._first, self._heard = reply, first, heard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(message: dict[str, Any]) -> None:
            async with asyncio.timeout(SEND_S):  # a client that does not read may not stay for ever
                await send(message)

        try:
            await put({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._parts():
                await put({"type": "http.response.body", "body": part, "more_body": True})
            await put({"type": "http.response.body", "body": b"", "more_body": False})
        except (Disconnected, TimeoutError, OSError):
            pass
        finally:
            self._heard.close()

    async def _parts(self) -> AsyncIterator[bytes]:
        part, events = self._reply.opening(), self._first
        while True:
            error = next((event for event in events if isinstance(event, BaseException)), None)
            part += self._reply.frames([event for event in events if not isinstance(event, BaseException)])
            if error is not None:
                yield part + self._reply.failure(error)
                return
            if self._heard.ended(events):
                yield part + self._reply.ending()
                return
            if part:
                yield part
            part = b""
            events = await self._heard.next()
