"""Sessions on disk: what comes back is what was saved, and goes on as if it had never been away."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvq.runtime.session.generation as generate
from kvq.controller.policies import Policy, make_policy
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import BudgetError, PolicyError, SessionError
from kvq.runtime.precision.table import named
from kvq.runtime.session.header import MOST_PARTS
from tests.tools.kvdata import arrays_in, examples
from tests.tools.session_files import contents, continued, split

CONTEXT, VOCAB = 256, 512
IDS = np.random.default_rng(0).integers(1, VOCAB, 200).tolist()
AVAILABLE = sorted(name for name, backend in BACKENDS.items() if not backend.unavailable())
SAMPLED = {"temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}
RECENT = st.sampled_from([0, 1, 5, 16, 40, CONTEXT])
SETTINGS = st.one_of(
    st.builds(
        dict,
        policy=st.sampled_from(["fp16", "int8", "int4", "int3", "int2", "k8v4", "mixed", "random"]),
        recent=RECENT,
    ),
    st.builds(dict, policy=st.just("rule"), recent=RECENT),
    st.builds(dict, policy=st.just("rule"), recent=st.sampled_from([0, 5]), kv_bits=st.floats(9, 14)),
    st.builds(dict, policy=st.just("rule"), recent=st.sampled_from([0, 5]), kv_memory=st.floats(1.5e5, 4e5)),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "session.kvq"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions") / "session.kvq"


@pytest.mark.slow
@given(
    settings=SETTINGS,
    sink=st.sampled_from([0, 0, 3]),
    prefill_chunk=st.sampled_from([7, 128]),
    length=st.integers(0, 150),
    generated=st.sampled_from([0, 0, 1, 9]),
    trimmed=st.one_of(st.none(), st.integers(0, 150)),
    backend=st.sampled_from(AVAILABLE),
)
@examples(30)
def test_a_loaded_session_is_the_saved_one_and_goes_on_alike(
    settings, sink, prefill_chunk, length, generated, trimmed, backend, tiny_model, scratch
):
    session = tiny_model.session(**settings, sink=sink, prefill_chunk=prefill_chunk, backend=backend)
    if length:
        session.append(IDS[:length])
        if generated:
            continued(session, generated, **SAMPLED)
        if trimmed is not None:
            session.trim(min(trimmed, len(session.tokens)))
    session.metadata = {"length": length, "text": ["é\ud800", None, 1.5]}
    session.save(scratch)
    loaded = tiny_model.load_session(scratch, backend=backend)
    assert contents(loaded) == contents(session)
    first = scratch.read_bytes()
    loaded.save(scratch)
    assert scratch.read_bytes() == first
    if not session.tokens:
        return
    arms = (session, loaded)
    sampled = [continued(arm, 6, **SAMPLED) for arm in arms]
    assert sampled[0] == sampled[1]
    greedy = [continued(arm, 6) for arm in arms]
    assert greedy[0] == greedy[1]
    more = [arm.append(IDS[150:170], all_logits=True) for arm in arms]
    np.testing.assert_array_equal(more[0], more[1])
    assert contents(session) == contents(loaded)


@pytest.mark.parametrize("options", [SAMPLED, {"temperature": 0}], ids=["seeded", "greedy"])
@pytest.mark.parametrize("cuts", [[1, 39], [3, 1, 1, 30, 5]], ids=str)
@pytest.mark.parametrize("policy", ["fp16", "mixed", "rule"])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_generation_cut_by_save_and_load_gives_the_text_of_an_uninterrupted_one(
    tiny_model, path, options, cuts, policy, backend
):
    whole = tiny_model.session(policy, recent=8, backend=backend)
    whole.append(IDS[:30])
    expected = continued(whole, 40, **options)
    session = tiny_model.session(policy, recent=8, backend=backend)
    session.append(IDS[:30])
    found = []
    for cut in cuts:
        session.save(path)
        session = tiny_model.load_session(path, backend=backend)
        found += continued(session, cut, **options)
    assert found == expected


@pytest.mark.parametrize("taken", [1, 2, 7])
def test_a_generation_closed_early_can_be_saved_and_continued(tiny_model, path, taken):
    options = {"ignore_eos": True, **SAMPLED}
    expected = [r.token for r in tiny_model.session("int4").generate("Hello", max_tokens=20, **options)]
    session = tiny_model.session("int4")
    stream = session.generate("Hello", max_tokens=20, **options)
    found = [next(stream).token for _ in range(taken)]
    session.save(path)
    stream.close()
    loaded = tiny_model.load_session(path)
    assert found + [token for token, _ in continued(loaded, 20 - taken, **SAMPLED)] == expected


def test_both_backends_write_the_same_file_and_read_each_other_s(tiny_model, path):
    if len(AVAILABLE) < 2:
        pytest.skip("one attention backend here")
    session = tiny_model.session("mixed", recent=5, backend=AVAILABLE[0])
    session.append(IDS[:60])
    session.save(path)
    first = path.read_bytes()
    for backend in AVAILABLE:
        loaded = tiny_model.load_session(path, backend=backend)
        assert loaded.stats().backend == backend
        loaded.append(IDS[60:61])
        loaded = tiny_model.load_session(path, backend=backend)
        loaded.save(path)
        assert path.read_bytes() == first


def test_a_file_is_small_and_says_nothing_of_trimmed_tokens(tiny_model, path):
    session = tiny_model.session("int4", recent=0)
    session.append(IDS[:130])
    session.trim(70)
    session.append([3])
    session.pending = [1]  # no logits in the file
    session.save(path)
    fresh = tiny_model.session("int4", recent=0)
    fresh.store = session.store.fork(fresh.backend.codecs)
    pages = fresh.store.buckets[named("4")].pages
    pages[-1] = pages[-1].copy(pages[-1].count, pages[-1].capacity)  # its free room is zero
    fresh.tokens, fresh.pending = session.tokens, [1]
    again = path.with_name("again.kvq")
    fresh.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert len(split(path)[1]) == session.store.used_nbytes + 4 * 71


def test_the_arrays_of_a_loaded_session_are_its_own(tiny_model, path):
    session = tiny_model.session("mixed")
    session.append(IDS[:90])
    session.save(path)
    loaded = tiny_model.load_session(path)
    assert loaded.store.nbytes == sum(array.nbytes for array in arrays_in(loaded.store)) == session.store.nbytes


@pytest.mark.slow
def test_metadata_and_settings_come_back(tiny_model, path):
    policy = make_policy("random", weights=[0, 1, 2, 1], seed=9)
    session = tiny_model.session(policy, recent=3, sink=2, prefill_chunk=50, kv_bits=11)
    session.metadata["chat"] = [{"role": "user", "content": "Wie spät?"}]
    session.append(IDS[:40])
    session.save(path)
    loaded = tiny_model.load_session(path)
    assert loaded.metadata == {"chat": [{"role": "user", "content": "Wie spät?"}]}
    assert (loaded.store.window.capacity, loaded.store.sink, loaded.prefill_chunk) == (3, 2, 50)
    assert (loaded.policy.seed, loaded.kv_bits) == (9, 11)
    np.testing.assert_array_equal(loaded.policy.logarithms, policy.logarithms)


@pytest.mark.parametrize(
    "metadata",
    [{"a": ...}, {"a": float("nan")}, {1: 2}, {"a": (1, 2)}, {"a": b"x"}, {"a": {2: 3}}, {"a": np.float32(1)}],
    ids=repr,
)
def test_metadata_that_json_would_change_is_refused_and_the_file_stays(tiny_model, path, metadata):
    session = tiny_model.session()
    session.append([1])
    session.save(path)
    before = path.read_bytes()
    session.metadata = metadata
    with pytest.raises(SessionError, match="metadata must be JSON values") as caught:
        session.save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_more_values_than_a_header_holds_are_refused(tiny_model, path):
    session = tiny_model.session()
    session.metadata = {"a": [0] * MOST_PARTS}
    with pytest.raises(SessionError, match="values and separators"):
        session.save(path)
    assert not path.exists()
    session.metadata = {"[,{": ['[,"{\\' * 9] * (MOST_PARTS // 2 - 100)}  # what stands in a text is none
    session.save(path)
    assert tiny_model.load_session(path).metadata == session.metadata


def test_more_metadata_than_a_header_holds_is_refused(tiny_model, path):
    session = tiny_model.session()
    session.metadata = {"text": "x" * (1 << 24)}
    with pytest.raises(SessionError, match="keep less in it"):
        session.save(path)
    assert list(path.parent.iterdir()) == []


class Thirds(Policy):
    name = "thirds"

    def choose(self, features):
        return np.where(features.positions[:, None] % 3 == 0, [[8, 4]], [[4, 2]]).astype(np.uint8)


def test_a_policy_object_has_to_be_given_again(tiny_model, path):
    session = tiny_model.session(Thirds(), recent=0)
    session.append(IDS[:30])
    session.save(path)
    with pytest.raises(SessionError, match=r"written under the policy object 'thirds'.* pass a policy"):
        tiny_model.load_session(path)
    loaded = tiny_model.load_session(path, Thirds())
    assert continued(loaded, 8) == continued(session, 8)


def test_a_policy_given_at_load_decides_about_new_tokens_alone(tiny_model, path):
    session = tiny_model.session("int8", recent=4, sink=0)
    session.append(IDS[:40])
    session.save(path)
    loaded = tiny_model.load_session(path, "k4v2")
    before = contents(loaded)["pages"]
    loaded.append(IDS[40:60])
    after = [page for page in contents(loaded)["pages"] if page[0] == before[0][0]]
    assert after[: len(before) - 1] == before[:-1]  # the last one got the window's tokens
    rows = {name: row["tokens"] for name, row in loaded.store.account().items()}
    assert rows == {"k8v8": 40, "k4v2": 16, "recent": 4}
    with pytest.raises(PolicyError, match="unknown policy 'int5'"):
        tiny_model.load_session(path, "int5")


@pytest.mark.slow
def test_a_budget_given_at_load_counts_tokens_of_any_precision(tiny_model, path):
    session = tiny_model.session("k8v2", recent=4)  # not a class of `random`
    session.append(IDS[:60])
    session.save(path)
    loaded = tiny_model.load_session(path, "random", kv_bits=10)
    for token in IDS[:100]:
        loaded.append([token])
    budget = loaded.chooser.budget
    assert budget.used(loaded.store) <= budget.allowed(loaded.store.length)
    with pytest.raises(SessionError, match="cannot follow a budget"):
        tiny_model.load_session(path, kv_bits=10)
    with pytest.raises(BudgetError):
        tiny_model.load_session(path, "random", kv_bits=1)


@pytest.mark.parametrize("limit", [{"kv_bits": 9}, {"kv_bits": 12.5}, {"kv_memory": 1.4e5}], ids=str)
def test_a_budget_holds_at_every_token_after_load_fork_and_trim(tiny_model, path, limit):
    session = tiny_model.session("rule", recent=4, **limit)

    def grow(part, count):
        for token in IDS[:count]:
            part.append([token])
            assert part.budget.used(part.store) <= part.budget.allowed(part.store.length)

    grow(session, 70)
    session.save(path)
    session = tiny_model.load_session(path)
    grow(session, 20)
    fork = session.fork()
    grow(fork, 30)
    session.trim(45)
    grow(session, 60)
    fork.trim(100)
    fork.save(path)
    grow(tiny_model.load_session(path), 40)


def test_a_budget_that_trimming_a_prompt_has_broken_holds_again_a_little_later(tiny_model):
    session = tiny_model.session("rule", recent=4, kv_bits=12.5)
    session.append(IDS[:70])  # the first tokens spend what the last ones save
    session.trim(45)
    over = []
    for token in IDS[:60]:
        session.append([token])
        over.append(session.store.used_nbytes > session.budget.allowed(session.store.length))
    assert over == sorted(over, reverse=True)
    assert not over[-1]


def test_a_full_context_is_saved_without_the_token_that_does_not_fit(tiny_model, path):
    session = tiny_model.session("int4")
    stream = session.generate(IDS[:100], max_tokens=None, temperature=0, ignore_eos=True)
    while next(stream).finish_reason is None:  # not closed: the last token is still pending
        pass
    assert session.room < 0
    session.save(path)
    loaded = tiny_model.load_session(path)
    assert (len(loaded.tokens), loaded.pending) == (CONTEXT, [])
    loaded.trim(100)
    assert loaded.tokens == IDS[:100]


def test_a_session_interrupted_inside_a_step_is_not_saved(tiny_model, path):
    session = tiny_model.session()
    session.append(IDS[:20])
    session.tokens.pop()
    with pytest.raises(SessionError, match="interrupted in the middle of a step"):
        session.save(path)
    assert not path.exists()


def test_logits_do_not_outlive_their_token_when_a_later_chunk_fails(tiny_model):
    session = tiny_model.session(prefill_chunk=10)
    session.append(IDS[:5])

    def stop(done, total):
        assert (done, total) == (10, 30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.append(IDS[5:35], progress=stop)
    assert session.tokens == IDS[:15]
    assert session.last_logits is None


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_character_cut_in_two_is_shown_whole_by_the_continuation(tiny_model, path, cut):
    text = "a€😀b"  # 9 bytes; the tokenizer has seen none of these characters, so they are tokens of one byte
    ids = tiny_model.encode(text)
    shown = ""
    session = tiny_model.session()
    session.append([5])
    cut = min(cut, len(ids) - 1)
    for part in (ids[:cut], ids[cut:]):
        queue = list(part)
        session.append([7]) if not session.pending else None
        shown += "".join(r.text for r in forced(session, queue))
        session.save(path)
        session = tiny_model.load_session(path)
    assert shown == text


def forced(session, queue):
    """A generation that says the queue's tokens, whatever the model would."""
    count, original = len(queue), generate.make_sampler
    generate.make_sampler = lambda **options: lambda logits, history: (queue.pop(0), 0.0)
    try:
        return list(session.generate(None, max_tokens=count, ignore_eos=True))
    finally:
        generate.make_sampler = original


@pytest.mark.parametrize("where", ["missing/session.kvq", "", "."], ids=["no folder", "a folder", "this folder"])
def test_a_path_that_cannot_be_written_is_a_session_error(tiny_model, tmp_path, where):
    session = tiny_model.session()
    session.append([1])
    with pytest.raises(SessionError) as caught:
        session.save(tmp_path / where)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_permissions_of_a_replaced_file_stay(tiny_model, path):
    session = tiny_model.session()
    session.append([1])
    session.save(path)
    os.chmod(path, 0o600)
    session.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
