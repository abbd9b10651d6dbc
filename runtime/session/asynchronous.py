"""Generation beside an event loop: each token is computed in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import TypeVar

T = TypeVar("T")


async def aiterate(responses: Iterator[T]) -> AsyncGenerator[T, None]:
    """Responses as an asynchronous generator: each token is computed in a thread, the event loop stays free.

    Closing it, or cancelling the task that waits for it, ends the generation after the token at hand.
    """
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, responses, None))
            try:
                response = await asyncio.shield(step)
            finally:
                if not step.done():  # cancelled: a generator cannot be closed while it runs
                    await asyncio.wait([step])
            if response is None:
                return
            yield response
    finally:
        responses.close()  # type: ignore[attr-defined] # a generator
