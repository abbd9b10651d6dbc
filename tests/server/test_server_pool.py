"""Scheduler and session pool without HTTP: what a response may not depend on, and the bound on bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvq
from kvq.runtime.errors import RequestError
from kvq.runtime.server.capacity import Capacity
from tests.tools.jobs import CHUNK, KINDS, Runner, alone, blank, text


@pytest.fixture
def runner(tiny_model):
    runner = Runner(tiny_model)
    yield runner
    runner.close()


def test_a_conversation_reuses_what_it_has_and_says_what_it_would_have_said_without(tiny_model, runner):
    ids, reused = text(0, 40), 0
    for turn in range(4):
        tokens, cached = runner.run(ids, KINDS[1], seed=turn)
        assert tokens == alone(tiny_model, ids, KINDS[1], seed=turn)
        assert cached == reused
        reused = (len(ids) - 1) // CHUNK * CHUNK
        ids = ids + tokens + text(100 + turn, 9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.policy)
def test_reuse_by_prompts_that_share_a_beginning(tiny_model, runner, kind):
    """A document and several questions: from the third on, the document is not processed again."""
    document = text(1, 70)
    for question in range(4):
        ids = document + text(10 + question, 30)
        tokens, cached = runner.run(ids, kind)
        assert tokens == alone(tiny_model, ids, kind)
        assert cached == (0 if question < 2 else 64)


def test_settings_do_not_share(tiny_model, runner):
    ids = text(2, 50)
    runner.run(ids, KINDS[0])
    tokens, cached = runner.run(ids, KINDS[1])
    assert cached == 0
    assert tokens == alone(tiny_model, ids, KINDS[1])


def test_a_shorter_prompt_than_a_kept_one(tiny_model, runner):
    ids = text(3, 100)
    runner.run(ids)
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 64, 65):
        assert runner.run(ids[:length])[0] == alone(tiny_model, ids[:length])


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_response_depends_on_what_was_answered_before_or_beside_it(tiny_model, data):
    """Conversations in random order, several at a time, under a bound that forces sessions out and back in.

    Beside them the same ones of requests that are not strict: what is kept of these is of no use to the others.
    """
    bounded = data.draw(st.booleans())
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=2))
    chats = [text(seed, data.draw(st.integers(1, 60))) for seed in range(data.draw(st.integers(1, 4)))]
    most = max(Capacity(blank(tiny_model, kind)).most_nbytes(250) for kind in kinds)
    limit = 2 * most if bounded else None
    runner = Runner(tiny_model, limit, disk=data.draw(st.sampled_from([0, 60_000, 10**9])))
    try:
        for turn in range(3):
            free = [runner.start(ids, kind, seed=turn, strict=False) for ids in chats for kind in kinds]
            jobs = [(ids, kind, runner.start(ids, kind, seed=turn)) for ids in chats for kind in kinds]
            for job in free:
                runner.finish(job)
            done = [(ids, kind, runner.finish(job)[0]) for ids, kind, job in jobs]
            for ids, kind, tokens in done:
                assert tokens == alone(tiny_model, ids, kind, seed=turn)
            chats = [ids + tokens + text(turn, 7) for ids, kind, tokens in done if kind == kinds[0]]
        assert not runner.log
        if limit is not None:
            assert max(runner.all_nbytes) <= limit
            assert runner.pool.peak_nbytes <= limit
    finally:
        runner.close()


def test_idle_sessions_go_to_disk_and_come_back(tiny_model):
    kind = KINDS[0]
    limit = Capacity(blank(tiny_model, kind)).most_nbytes(120) * 5 // 2
    runner = Runner(tiny_model, limit)
    folder = runner.pool.prefixes.folder
    chats = [text(seed, 100) for seed in range(4)]
    for _ in range(2):
        for ids in chats:
            assert runner.run(ids, kind)[0] == alone(tiny_model, ids, kind)
    assert runner.pool.prefixes.evictions >= 4
    assert runner.pool.prefixes.restores >= 3
    assert max(runner.all_nbytes) <= limit
    assert list(folder.iterdir())
    runner.close()
    assert not folder.exists()


def test_files_stay_within_their_bound(tiny_model):
    kind = KINDS[0]
    limit = Capacity(blank(tiny_model, kind)).most_nbytes(120) * 5 // 2
    runner = Runner(tiny_model, limit, disk=100_000)
    for seed in range(6):
        runner.run(text(seed, 100), kind)
        files = runner.pool.prefixes.folder.iterdir()
        assert sum(file.stat().st_size for file in files) <= 100_000
    assert runner.pool.prefixes.dropped_files > 0
    assert runner.run(text(0, 100), kind) == (alone(tiny_model, text(0, 100), kind), 0)
    runner.close()


def test_a_damaged_file_is_told_and_its_conversation_processed_anew(tiny_model):
    kind = KINDS[0]
    limit = Capacity(blank(tiny_model, kind)).most_nbytes(120) * 5 // 2
    runner = Runner(tiny_model, limit)
    chats = [text(seed, 100) for seed in range(3)]
    for ids in chats:
        runner.run(ids, kind)
    for file in runner.pool.prefixes.folder.iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    for ids in chats:
        assert runner.run(ids, kind)[0] == alone(tiny_model, ids, kind)
    assert "cannot be restored" in runner.log[0]
    runner.close()


def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits(tiny_model):
    kind = KINDS[0]
    limit = Capacity(blank(tiny_model, kind)).most_nbytes(100)
    runner = Runner(tiny_model, limit)
    with pytest.raises(RequestError, match="may take") as refused:
        runner.pool.check(kind, 200)
    assert refused.value.status == 413
    jobs = [runner.start(text(seed, 80), kind, tokens=20) for seed in range(3)]
    assert [runner.finish(job)[0] for job in jobs] == [alone(tiny_model, text(s, 80), kind, 20) for s in range(3)]
    assert max(runner.all_nbytes) <= limit
    runner.close()


@pytest.mark.parametrize("policy", ["fp16", "int4", "k8v2", "mixed", "rule", "random"])
@pytest.mark.parametrize("sink", [0, 5])
def test_bounds_hold(tiny_model, policy, sink):
    """Bytes of a store never exceed what `Capacity` has said, nor grow by more in one append."""
    session = tiny_model.session(policy, sink=sink, prefill_chunk=CHUNK)
    capacity = Capacity(session)
    generator = np.random.default_rng(5)
    while session.room:
        tokens = min(int(generator.choice([1, 1, 3, CHUNK])), session.room)
        twin = session.fork() if generator.random() < 0.3 else None
        held = [session] if twin is None else [session, twin]
        before, bound = kvq.kv_nbytes(held), capacity.growth(session.store, tokens)
        session.append(generator.integers(1, 500, tokens))
        assert kvq.kv_nbytes(held) - before <= bound
        assert session.store.nbytes <= capacity.most_nbytes(session.store.length)


def test_a_short_request_overtakes_a_long_prompt(tiny_model):
    runner = Runner(tiny_model, concurrency=3)
    with runner.held():
        long, short = runner.start(text(0, 240), tokens=4), runner.start(text(1, 3), tokens=4)
    runner.finish(long)
    runner.finish(short)
    assert runner.order == [short] * 4 + [long] * 4
    runner.close()


def test_what_prompts_at_once_begin_with_is_read_once(tiny_model):
    """Whoever comes while another reads the same waits until that is past it; one of other settings does not."""
    runner, begun = Runner(tiny_model, concurrency=8), text(0, 5 * CHUNK)
    prompts = [begun + text(1, 40), begun + text(2, 3), begun[: 2 * CHUNK] + text(3, 30), begun + text(4, 70)]
    with runner.held():
        jobs = [runner.start(ids, tokens=4) for ids in prompts]
        other = runner.start(prompts[0], KINDS[1], tokens=4)
    found = [runner.finish(job) for job in jobs]
    assert [cached for _, cached in found] == [0, 5 * CHUNK, 2 * CHUNK, 5 * CHUNK]
    assert [tokens for tokens, _ in found] == [alone(tiny_model, ids, tokens=4) for ids in prompts]
    assert runner.finish(other) == (alone(tiny_model, prompts[0], KINDS[1], tokens=4), 0)
    assert runner.order.index(jobs[2]) < runner.order.index(jobs[0])  # it did not wait for all of the other prompt
    runner.close()


def test_who_waited_for_another_prompt_reads_its_own_where_that_is_given_up(tiny_model):
    runner, begun = Runner(tiny_model, concurrency=4), text(0, 12 * CHUNK)
    with runner.held():
        first, second = runner.start([*begun, 1], tokens=4), runner.start([*begun, 2], tokens=4)
        first.cancelled.set()
    assert runner.finish(second) == (alone(tiny_model, [*begun, 2], tokens=4), 0)
    runner.close()


def test_jobs_take_turns_token_by_token(tiny_model):
    runner = Runner(tiny_model, concurrency=4)
    with runner.held():
        jobs = [runner.start(text(seed, 5), tokens=12) for seed in range(3)]
    for job in jobs:
        runner.finish(job)
    assert all(len(set(runner.order[at : at + 3])) == 3 for at in range(6, 24))
    passes = runner.scheduler.passes
    # One of what held the worker; all three prompts of five tokens; eleven times the further tokens of all.
    assert (passes.passes, passes.sessions, passes.rows) == (1 + 1 + 11, 1 + 3 + 33, 1 + 15 + 33)
    runner.close()


def test_a_cancelled_job_stops_within_a_step(tiny_model, runner):
    job = runner.start(text(0, 20), tokens=200)
    job.events.get(timeout=120)
    job.cancelled.set()
    steps = 1 + job.events.qsize()
    assert runner.run(text(1, 5), tokens=8)[0] == alone(tiny_model, text(1, 5))
    assert job.events.qsize() + 1 <= steps + 2
    assert runner.scheduler.counts() == (0, 0)


def test_deadline_queue_and_end(tiny_model):
    runner = Runner(tiny_model, concurrency=1, waiting=1)
    late = runner.start(text(0, 20), tokens=200, deadline=-1)
    with pytest.raises(RequestError, match="too long") as refused:
        runner.finish(late)
    assert refused.value.status == 503
    with runner.held():
        jobs = [runner.start(text(seed, 200), tokens=50) for seed in (1, 2)]
        with pytest.raises(RequestError, match="waiting") as refused:
            runner.start(text(3, 5))
        assert refused.value.status == 429
        runner.scheduler.stop()
    for job in jobs:
        with pytest.raises(RequestError, match="shutting down"):
            runner.finish(job)
    with pytest.raises(RequestError, match="shutting down"):
        runner.start(text(3, 5))
    runner.close()


def test_an_error_ends_one_job_and_no_other(tiny_model, runner):
    bad = runner.start([1, 2, 3], tokens=0)  # refused by Session.generate, past all checks of the server
    good = runner.start(text(1, 5))
    with pytest.raises(kvq.SamplingError):
        runner.finish(bad)
    assert runner.finish(good)[0] == alone(tiny_model, text(1, 5))
