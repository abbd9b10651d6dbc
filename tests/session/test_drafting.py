"""Drafts change nothing but time: same text, and at every token the session of one that never drafts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.compute.backends.native_pass import NativeHead as Head
from kvq.runtime.errors import SamplingError
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.drafted import Drafted
from kvq.runtime.session.generation import events
from kvq.runtime.session.pace import Pace
from tests.tools.packages import needs
from tests.tools.sessions import IDS

TEXT = "The captain looked at the sea. Nobody spoke, and the boats lay still. "
ENDLESS = {"ignore_eos": True, "temperature": 0}
native = pytest.mark.skipif("native" not in BACKENDS or bool(BACKENDS["native"].unavailable()), reason="no native")
POLICIES = [("int8", {}), ("fp16", {}), ("k4v2", {}), ("mixed", {}), ("rule", {"kv_bits": 4}), ("int8", {"recent": 3}),
            ("adaptive", {"kv_bits": 3.25}), ("adaptive", {"kv_memory": 2_000_000})]  # fmt: skip


@pytest.fixture
def eager(monkeypatch):
    """Passes are drafted wherever the text has a draft, right or wrong."""
    monkeypatch.setattr(Pace, "size", lambda self, agreeing, most, sessions: max(n for n in (1, 2, 4, 8) if n <= most))


def trace(session):
    """All that a session holds, but what it took."""
    session.store.settle()
    store, window = session.store, session.store.window
    pages = {
        str(pair): [(page.capacity, [part.tobytes() for part in page.parts(0, page.count)]) for page in bucket.pages]
        for pair, bucket in store.buckets.items()
    }
    slots = window.slots(store.length - window.count, store.length)
    ring = [x.tobytes() for part in (window.keys, window.values) for x in part.encoded(slots)]
    rarity = session.chooser._rarity
    logits = None if session.last_logits is None else session.last_logits.tobytes()
    counts = rarity.counts.tobytes(), rarity.seen, rarity.distinct
    taken = store.account(), store.nbytes, store.peak_nbytes, store.used_nbytes
    return pages, ring, window.chosen.tobytes(), counts, taken, session.tokens[:], session.pending[:], logits


@native
@pytest.mark.parametrize(("policy", "settings"), POLICIES, ids=str)
def test_at_every_token_the_session_is_one_that_never_drafted(policy, settings, embedded, eager, tmp_path):
    sessions = [embedded.session(policy, backend="native", **settings) for _ in range(2)]
    drafted, plain = (
        session.generate(TEXT * 2, max_tokens=40, draft=draft, **ENDLESS)
        for session, draft in zip(sessions, ("auto", "off"), strict=True)
    )
    for found, expected in zip(drafted, plain, strict=True):
        assert found == expected
        if found.index % 3 == 0:
            assert trace(sessions[0]) == trace(sessions[1])
    stats = sessions[0].stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens  # both ways were gone
    assert f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted" in stats.line()
    assert sessions[1].stats().drafted_tokens == 0
    files = [tmp_path / name for name in ("drafted", "plain")]
    for session, file in zip(sessions, files, strict=True):
        session.save(file)
    assert files[0].read_bytes() == files[1].read_bytes()


@native
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 5}, {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "seed": 1},
        {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0, "logit_bias": {260: 3.0, 44: -100.0}},
        {"temperature": 0, "stop": ["boats", "sea"]}, {"temperature": 0, "max_tokens": 1},
        {"temperature": 0, "max_tokens": 7},
        {"temperature": 0.7, "seed": 2, "logits_processor": lambda ids, logits: logits - 0.01 * (len(ids) % 3)},
    ],
    ids=lambda options: ",".join(options),
)  # fmt: skip
def test_the_text_is_the_same_whatever_chooses_it(options, embedded, monkeypatch):
    monkeypatch.setattr(Pace, "size", lambda self, agreeing, most, sessions: max(n for n in (1, 2, 4, 8) if n <= most))
    found = []
    for draft in ("auto", 5, "off"):
        session = embedded.session()
        given = {"max_tokens": 40, "ignore_eos": True, **options, "draft": draft}
        found.append((list(session.generate(TEXT * 2, **given)), trace(session)))
    assert found[0] == found[1] == found[2]


@native
@pytest.mark.parametrize(
    "structure",
    [{"regex": "(the sea ){8}"}, {"schema": {"type": "array", "items": {"const": "sea"}, "minItems": 6, "maxItems": 6}},
     {"choice": ["the sea and the sea and the sea and the sea"]}],
    ids=str,
)  # fmt: skip
def test_a_text_keeps_to_its_grammar_with_drafts_too(structure, embedded, eager):
    needs("llguidance")
    found = []
    for draft in ("auto", "off"):
        session = embedded.session()
        found.append(list(session.generate(TEXT, max_tokens=60, temperature=0, draft=draft, **structure)))
    assert found[0] == found[1]
    assert found[0][-1].finish_reason == "stop"


@native
def test_a_text_goes_on_alike_behind_forks_files_trims_and_the_end_of_a_context(embedded, eager, tmp_path):
    def told(draft):
        session = embedded.session("k4v4")
        said = [r.token for r, _ in zip(session.generate(TEXT * 2, draft=draft, **ENDLESS), range(11), strict=False)]
        twin = session.fork()
        session.save(tmp_path / "file")
        loaded = embedded.load_session(tmp_path / "file")
        for each in (session, twin, loaded):
            said += [r.token for r in each.generate(None, max_tokens=9, draft=draft, **ENDLESS)]
        session.trim(len(session.tokens) - 13)
        said += [r.token for r in session.generate(" sea", max_tokens=9, draft=draft, **ENDLESS)]
        twin.append(np.resize(twin.tokens, twin.room - 20))
        rest = list(twin.generate(None, max_tokens=None, draft=draft, **ENDLESS))
        return said, rest, trace(session), trace(loaded)

    assert told("auto") == told("off")


@native
@given(st.lists(st.sampled_from(POLICIES), min_size=2, max_size=4), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sessions_that_share_passes_draft_and_are_those_that_never_did(embedded, eager, kinds, seed, data):
    """Sessions begin at any time, so prompts are read in the passes in which others draft; of all kinds of options."""
    sampling = [{"temperature": 0}, {"temperature": 0.8, "seed": seed}, {"temperature": 1.2, "top_k": 0, "seed": seed}]
    options = [
        {**data.draw(st.sampled_from(sampling)), "ignore_eos": True, "max_tokens": data.draw(st.integers(1, 24))}
        for _ in kinds
    ]
    begins = [data.draw(st.integers(0, 6)) for _ in kinds]
    drafts = [data.draw(st.sampled_from(("auto", 3))) for _ in kinds]
    together, alone = ([embedded.session(p, backend="native", **more) for p, more in kinds] for _ in range(2))
    texts = [
        events(session, TEXT * 2, draft=draft, **option)
        for session, draft, option in zip(together, drafts, options, strict=True)
    ]
    found, work, round_ = [[] for _ in kinds], {}, 0
    while round_ < 7 or work:
        for i, begin in enumerate(begins):
            if begin == round_:
                work[i] = next(texts[i])
        assert embedded.run_pass(list(work.values())) == [None] * len(work)
        for i in [i for i, appending in work.items() if appending.finished]:
            del work[i]
            for event in texts[i]:
                if isinstance(event, Appending):
                    work[i] = event
                    break
                found[i].append(event)
        round_ += 1
    for session, option, said, drafted in zip(alone, options, found, together, strict=True):
        assert said == list(session.generate(TEXT * 2, draft="off", **option))
        assert trace(drafted) == trace(session)


@native
def test_a_text_that_is_changed_behind_a_draft_takes_nothing_of_it(embedded, eager):
    """An append of the caller's own between drafted tokens: the rows behind it are of another text."""

    def told(draft):
        session = embedded.session()
        text = session.generate(TEXT * 2, draft=draft, **ENDLESS)
        said = [next(text).token for _ in range(6)]
        session.append([said[-1]])
        said += [r.token for r in session.generate(None, max_tokens=8, draft=draft, **ENDLESS)]
        return said, trace(session)

    assert told("auto") == told("off")


@native
def test_what_a_draft_has_made_room_for_is_given_back_where_its_pass_fails(embedded, eager, monkeypatch):
    session = embedded.session("k4v4", backend="native")
    following = events(session, TEXT * 2, draft=8, **ENDLESS)
    drafted = next(event for event in following if isinstance(event, Drafted) or ran(event))
    before = trace(session)

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Head, "usable", fails)
    with pytest.raises(MemoryError):
        drafted.run()
    assert trace(session) == before
    assert [type(error) for error in embedded.run_pass([drafted])] == [MemoryError]
    assert trace(session) == before


def ran(event):
    if isinstance(event, Appending):
        event.run()
    return False


@native
def test_a_conversation_takes_the_option(embedded, eager):
    found = []
    for draft in ("auto", "off"):
        chat = embedded.chat("You repeat.")
        options = {"max_tokens": 24, "draft": draft, **ENDLESS}
        found.append(["".join(r.text for r in chat.reply(TEXT, **options)) for _ in range(2)])
        assert bool(chat.session.stats().drafted_tokens) == (draft == "auto")
    assert found[0] == found[1]


@native
def test_products_that_round_otherwise_among_several_rows_have_no_drafts(tiny_model):
    session = tiny_model.session(backend="native")  # 32-bit weights, which onnxruntime multiplies
    list(session.generate(IDS[:20] * 2, max_tokens=20, **ENDLESS))
    stats = session.stats()
    assert stats.drafted_tokens == 0
    assert "products" in stats.draft_reason
    assert json.loads(json.dumps(stats.as_dict()))["draft_reason"] == stats.draft_reason
    with pytest.raises(SamplingError, match=r"cannot draft: .*products.*; leave draft out"):
        session.generate(None, draft=4)


def test_numpy_attention_has_no_drafts(embedded):
    session = embedded.session(backend="numpy")
    found = [r.token for r in session.generate(TEXT, max_tokens=8, **ENDLESS)]
    assert found == [
        r.token for r in embedded.session(backend="numpy").generate(TEXT, max_tokens=8, draft="off", **ENDLESS)
    ]
    assert "numpy" in session.stats().draft_reason
    with pytest.raises(SamplingError, match="numpy"):
        session.generate(None, draft=4)


@native
@pytest.mark.parametrize("draft", ["fast", -1, 2.5, "", "-3", 17])
def test_other_drafts_are_refused(draft, embedded):
    session = embedded.session(backend="native")
    with pytest.raises(SamplingError, match="draft must be"):
        session.generate("x", draft=draft)
    with pytest.raises(SamplingError, match="no recent window"):
        embedded.session(backend="native", recent=0).generate("x", draft=2)
