"""Generation beside an event loop, and what becomes of it when its task is cancelled."""

from __future__ import annotations

import asyncio
import itertools

import pytest

import kvq

LONG = list(range(1, 400)) * 3


async def consume(session):
    async for _ in kvq.aiterate(session.generate(LONG, max_tokens=50, seed=1)):
        pass


@pytest.mark.parametrize("times", [1, 2, 5])
def test_however_often_it_is_cancelled_its_thread_has_ended(embedded, times):
    """The awaiting code sees the cancellation and nothing else, and the session can be used at once."""

    async def main():
        session = embedded.session("int8", prefill_chunk=2000)
        task = asyncio.create_task(consume(session))
        for _ in range(times):
            await asyncio.sleep(0.02)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(list(session.generate([5], max_tokens=3, ignore_eos=True))) == 3

    for _ in range(3):
        asyncio.run(main())


def test_a_loop_that_ends_ends_what_is_under_way(embedded, caplog):
    sessions = [embedded.session("int8") for _ in range(3)]
    tasks = []

    async def main():
        tasks.extend(asyncio.create_task(consume(session)) for session in sessions)
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert all(task.cancelled() for task in tasks)
    assert not caplog.records  # asyncio logs what nobody has caught
    for session in sessions:
        assert len(list(session.generate([5], max_tokens=3, ignore_eos=True))) == 3


def test_an_iterator_that_cannot_be_closed_is_taken_too(embedded):
    async def main():
        responses = embedded.session("int8").generate("The sea", max_tokens=9, ignore_eos=True)
        return [response async for response in kvq.aiterate(itertools.islice(responses, 3))]

    assert len(asyncio.run(main())) == 3
