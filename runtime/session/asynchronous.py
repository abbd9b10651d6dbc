"""Generation beside an event loop: each token is computed in a thread."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def aiterate(responses: Iterator[T]) -> AsyncGenerator[T, None]:
    """Responses as an asynchronous generator: each token is computed in a thread, the event loop stays free.

    Closing it, or cancelling the task that waits for it, ends the generation after the token at hand: however often
    it is cancelled, nothing computes any more when it has ended.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            context = contextvars.copy_context()
            # A future and no task: a loop that ends cancels all tasks, and a thread would go on behind a cancelled one.
            step = loop.run_in_executor(None, partial(context.run, _next, responses))
            response = await _outlasting(step)
            if response is None:
                return
            yield response
    finally:
        if (close := getattr(responses, "close", None)) is not None:
            close()


def _next(responses: Iterator[T]) -> T | None:
    return next(responses, None)


async def _outlasting(step: asyncio.Future[T]) -> T:
    """Its result. Where the wait is cancelled it is waited for all the same, and then the cancellation is told."""
    cancelled = None
    while not step.done():
        try:
            await asyncio.wait([step])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not step.cancelled():
            step.exception()  # nobody asks for it any more
        raise cancelled
    return step.result()
