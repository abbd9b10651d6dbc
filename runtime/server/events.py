"""A job's events on the way to its client: heard as long as the client is there, streamed or collected."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvq.runtime.server.refusals import error_body
from kvq.runtime.server.responses import Reply
from kvq.runtime.server.scheduler import Done, Event, Job, Step

LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
SEND_S = 60.0  # seconds a client may take to accept a part of a stream


class Disconnected(Exception):
    """The client has gone."""


class Events:
    """The events of a job. When the client goes away, the worker drops the job at its next step.

    Args:
        job: tells its events to `queue`, in the event loop's thread.
        queue: where they arrive.
        request: the client's; its body has been read.
    """

    def __init__(self, job: Job, queue: asyncio.Queue[Event], request: Request) -> None:
        self._job, self._queue = job, queue
        self._watch = asyncio.ensure_future(self._until_gone(request))

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._job.cancelled.set()
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

    async def rest(self, events: list[Event]) -> tuple[list[Step], Done]:
        """All steps to the end, these first, and what the last one says; raises the error if one comes instead."""
        steps: list[Step] = []
        while True:
            for event in events:
                if isinstance(event, BaseException):
                    raise event
                steps.append(event)
                if event.done is not None:
                    self.close()
                    return steps, event.done
            events = await self.next()

    def close(self) -> None:
        """Nobody listens any more."""
        self._job.cancelled.set()
        self._watch.cancel()


class EventStream(Response):
    """A job's events as server-sent events. An error after the first one is the last event of the stream."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, first: list[Event], heard: Events) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
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
        opening = self._reply.opening()
        part = b"" if opening is None else _sse(opening)
        events = self._first
        while True:
            for event in events:
                if isinstance(event, BaseException):
                    yield part + _sse(error_body(event))
                    return
                body = self._reply.frame(event)
                part += b"" if body is None else _sse(body)
                if event.done is not None:
                    usage = self._reply.usage_frame(event.done)
                    yield part + (b"" if usage is None else _sse(usage)) + b"data: [DONE]\n\n"
                    return
            if part:
                yield part
            part = b""
            events = await self._heard.next()


def _sse(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    # Line ends to some clients, where they would split the event; JSON's own escapes are left to split nothing.
    return b"data: " + text.translate(LINE_ENDS).encode() + b"\n\n"
