"""Sessions do not see each other, interleaved or in threads, and a decode step keeps nothing."""

from __future__ import annotations

import gc
import threading
import tracemalloc

import pytest

from tests.tools.sessions import IDS, greedy

RUNS = [("fp16", IDS[:30]), ("mixed", IDS[20:70]), ("rule", IDS[50:55]), ("int4", IDS[5:90])]


@pytest.fixture(scope="module")
def single_runs(tiny_model):
    """The greedy tokens of each of RUNS alone."""
    return [greedy(tiny_model.session(policy), prompt, 25) for policy, prompt in RUNS]


def test_interleaved_sessions_do_not_see_each_other(tiny_model, single_runs):
    options = {"max_tokens": 25, "temperature": 0, "ignore_eos": True}
    streams = [tiny_model.session(policy).generate(prompt, **options) for policy, prompt in RUNS]
    tokens = [[] for _ in RUNS]
    for _ in range(25):
        for run, stream in zip(tokens, streams, strict=True):
            run.append(next(stream).token)
    assert tokens == single_runs


def test_sessions_in_four_threads_at_once_give_their_single_runs(tiny_model, single_runs):
    tokens: list = [None] * len(RUNS)
    start = threading.Barrier(len(RUNS))

    def work(index: int) -> None:
        policy, prompt = RUNS[index]
        start.wait()
        tokens[index] = [greedy(tiny_model.session(policy), prompt, 25) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(RUNS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens == [[run] * 3 for run in single_runs]


# The numpy backend's scratch for one block, 2 * 4 heads * 1024 tokens * 8 * 4 bytes = 262 kB, is made anew for
# every layer and dropped; beside it 24 to 41 kB were measured. Twenty steps kept 3 to 7 kB beyond the store
# (Python integers, views of pages): a kilobyte kept per step, such as the logits of 2 kB, would show.
STEP_PEAK_NBYTES = 262_144 + 80_000
STEPS_KEPT_NBYTES = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fp16", "mixed", "rule"])
def test_a_decode_step_allocates_little_and_keeps_nothing(tiny_model, policy):
    tracemalloc.start()  # before the first page: one that is replaced by a larger one is then known to be gone
    try:
        session = tiny_model.session(policy, backend="numpy")
        session.append(IDS[:95])
        for token in IDS[95:100]:
            session.append([token])
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        store = session.store.nbytes
        for token in IDS[100:120]:
            session.append([token])
        peak = tracemalloc.get_traced_memory()[1] - before
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before - (session.store.nbytes - store)
    finally:
        tracemalloc.stop()
    assert peak < STEP_PEAK_NBYTES
    assert kept < STEPS_KEPT_NBYTES
