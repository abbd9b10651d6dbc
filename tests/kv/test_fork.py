"""Forked sessions: one text, shared pages, and nothing that one of them does is seen by another."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvq
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import SessionError
from tests.tools.kvdata import arrays_in, examples
from tests.tools.session_files import contents, continued

IDS = np.random.default_rng(1).integers(1, 512, 250).tolist()
AVAILABLE = sorted(name for name, backend in BACKENDS.items() if not backend.unavailable())
SAMPLED = {"temperature": 1.0, "seed": 2}

# What is done to one of several sessions: append so many tokens, trim so many off, or fork it.
STEPS = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from(["append", "append", "one", "trim", "fork", "save"]), st.integers(1, 60)
    ),
    min_size=2,
    max_size=14,
)


def held(sessions) -> int:
    """Bytes of all arrays of the stores, each array once."""
    stores = [session.store for session in sessions]
    return sum(array.nbytes for array in arrays_in([(store.window, store.buckets) for store in stores]))


@pytest.mark.slow
@given(
    steps=STEPS, policy=st.sampled_from(["fp16", "int4", "mixed"]), recent=st.sampled_from([0, 4, 16]),
    backend=st.sampled_from(AVAILABLE),
)  # fmt: skip
@examples(30)
def test_sessions_forked_trimmed_and_grown_in_any_order_equal_ones_that_never_shared(
    steps, policy, recent, backend, tiny_model, tmp_path_factory
):
    """Each session has a twin that does the same without ever sharing a page: it is saved and loaded instead."""
    path = tmp_path_factory.getbasetemp() / "twin.kvq"
    sessions = [tiny_model.session(policy, recent=recent, backend=backend)]
    sessions[0].append(IDS[:50])
    sessions[0].save(path)
    twins = [tiny_model.load_session(path, backend=backend)]
    for number, step, amount in steps:
        number %= len(sessions)
        pair = (sessions[number], twins[number])
        length = len(pair[0].tokens)
        if step == "append" and length + amount <= 250:
            logits = [part.append(IDS[length : length + amount]) for part in pair]
            np.testing.assert_array_equal(*logits)
        elif step == "one" and length + 8 <= 250:
            for token in IDS[amount : amount + 8]:
                np.testing.assert_array_equal(*[part.append([token]) for part in pair])
        elif step == "trim":
            for part in pair:
                part.trim(max(0, length - amount))
        elif step == "fork" and len(sessions) < 4:
            sessions.append(pair[0].fork())
            pair[1].save(path)
            twins.append(tiny_model.load_session(path, backend=backend))
        elif step == "save":
            pair[0].save(path)
            assert contents(tiny_model.load_session(path)) == contents(pair[0])
        for one, other in zip(sessions, twins, strict=True):
            assert contents(one) == contents(other)
        assert kvq.kv_nbytes(sessions) == held(sessions)
        assert kvq.kv_nbytes(sessions[:1]) == sessions[0].stats().kv_nbytes
    assert kvq.kv_nbytes(twins) == sum(twin.store.nbytes for twin in twins) >= kvq.kv_nbytes(sessions)


def test_forks_take_little_more_than_one_session(tiny_model):
    session = tiny_model.session("int8", recent=4)
    session.append(IDS)
    forks = [session.fork() for _ in range(5)]
    one, window = session.store.nbytes, session.store.window.nbytes
    assert kvq.kv_nbytes([session, *forks]) == one + 5 * window
    for fork in forks:
        fork.append([1])  # quantizes a token of the window: each has a copy of the last page now
    last = session.store.buckets[8, 8].pages[-1].nbytes
    assert kvq.kv_nbytes([session, *forks]) == one + 5 * (window + last)
    assert kvq.kv_nbytes([session, session]) == one
    assert kvq.kv_nbytes(iter([session])) == one
    assert kvq.kv_nbytes([]) == 0


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_fork_continues_as_the_session_would_have_and_leaves_it_alone(tiny_model, backend):
    expected = tiny_model.session("mixed", backend=backend)
    expected.append(IDS[:70])
    text = continued(expected, 30, **SAMPLED)
    session = tiny_model.session("mixed", backend=backend)
    session.append(IDS[:70])
    first = continued(session, 10, **SAMPLED)
    forks = [session.fork(), session.fork()]
    forks[0].append(IDS[:40])
    forks[0].trim(20)
    assert first + continued(forks[1], 20, **SAMPLED) == text
    assert first + continued(session, 20, **SAMPLED) == text
    assert session.stats().backend == forks[0].stats().backend == backend


def test_metadata_and_settings_are_the_fork_s_own(tiny_model):
    session = tiny_model.session("rule", recent=3, sink=2, prefill_chunk=9, kv_bits=11)
    session.metadata = {"chat": ["a"]}
    session.append(IDS[:40])
    fork = session.fork()
    assert contents(fork) == contents(session)
    fork.metadata["chat"].append("b")
    fork.tokens.append(1)
    assert session.metadata == {"chat": ["a"]}
    assert len(session.tokens) == 40


def test_logits_given_to_a_caller_are_not_those_of_the_fork(tiny_model):
    session = tiny_model.session()
    logits = session.append(IDS[:10])
    fork = session.fork()
    expected = continued(session.fork(), 5)
    logits[:] = 0
    assert continued(fork, 5) == expected


def test_an_interrupted_session_is_not_forked(tiny_model):
    session = tiny_model.session()
    session.append(IDS[:20])
    session.tokens.pop()
    with pytest.raises(SessionError, match="interrupted in the middle of a step"):
        session.fork()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_forks_in_threads_that_trim_grow_and_fork_give_their_single_runs(tiny_model, backend):
    root = tiny_model.session("mixed", recent=4, backend=backend)
    root.append(IDS[:120])

    def work(session, seed):
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(6):
            session.trim(int(rng.integers(10, len(session.tokens))))
            child = session.fork()
            found.append(continued(child, int(rng.integers(1, 12)), **SAMPLED))
            session.append(IDS[: int(rng.integers(1, 20))])
            found.append(contents(session)["pages"])
        return found

    expected = [work(root.fork(), seed) for seed in range(4)]
    before = contents(root)
    forks, found = [root.fork() for _ in range(4)], [None] * 4
    start = threading.Barrier(4)

    def run(index):
        start.wait()
        found[index] = work(forks[index], index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert contents(root) == before
