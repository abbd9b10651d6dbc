"""Who asks for an answer that is drawn by chance goes on from answers; nobody else does."""

from __future__ import annotations

import pytest

from kvq.runtime.kv.store import KVStore
from kvq.runtime.server.lease import PIECE
from kvq.runtime.server.preparing import Limits, prepare
from kvq.runtime.server.protocol import Settings, parse_generation
from tests.tools.jobs import CHUNK, KINDS, Runner, alone, text


@pytest.fixture
def runner(tiny_model):
    runner = Runner(tiny_model)
    yield runner
    runner.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.kv_bits is None], ids=lambda kind: kind.policy)
def test_a_conversation_goes_on_from_its_answers(tiny_model, runner, kind):
    """It says what a session says that is fed the same turns, and only what is new is read."""
    session = tiny_model.session(kind.policy, recent=kind.recent, sink=kind.sink, prefill_chunk=CHUNK)
    ids, held = text(0, 40), 0
    for turn in range(4):
        tokens, cached = runner.run(ids, kind, seed=turn, strict=False)
        assert cached == held
        while (done := len(session.tokens)) < len(ids):  # chunks end at multiples
            session.append(ids[done : (done // CHUNK + 1) * CHUNK])
        assert tokens == [each.token for each in session.generate(None, max_tokens=8, temperature=1.0, seed=turn)]
        session.pending.clear()
        held = len(ids) + len(tokens) - 1  # the last token was never fed
        ids = ids + tokens + text(100 + turn, 9)


def test_an_answer_that_can_be_asked_for_again_does_not_go_on_from_answers(tiny_model, runner):
    kind = Settings("int4")
    ids = text(1, 50)
    tokens, _ = runner.run(ids, kind, strict=False)
    ids = ids + tokens + text(2, 30)
    found, cached = runner.run(ids, kind)
    assert (found, cached) == (alone(tiny_model, ids, kind), 48)  # whole chunks of the prompt are as good as its own
    assert runner.run(ids, kind, strict=False)[1] > 48


def test_where_feeding_makes_no_difference_all_go_on_from_answers(embedded):
    """A stepwise prefill without a budget: the answer is that of the request alone, and nothing is read twice."""
    runner, ids, held = Runner(embedded), text(3, 70), 0
    for turn in range(3):
        tokens, cached = runner.run(ids, Settings("adaptive"), seed=turn)
        assert cached == held
        whole = embedded.session("adaptive")
        whole.append(ids)
        assert tokens == [each.token for each in whole.generate(None, max_tokens=8, temperature=1.0, seed=turn)]
        held = len(ids) + len(tokens) - 1
        ids = ids + tokens + text(4 + turn, 11)
    runner.close()


def test_a_turn_replaces_what_was_kept_of_the_one_before(tiny_model, runner):
    """Of a conversation the newest prompt and its answer are kept, however long it gets."""
    ids = text(5, 40)
    for turn in range(6):
        tokens, _ = runner.run(ids, strict=False, seed=turn)
        assert sum(runner.pool.prefixes.counts()) <= 2
        ids = ids + tokens + text(6 + turn, CHUNK)


def test_an_answer_can_be_had_anew(tiny_model, runner):
    """Who asks for another answer to the same has the prompt cached, as far as whole chunks go."""
    ids = text(7, 100)
    runner.run(ids, strict=False, seed=1)
    tokens, cached = runner.run(ids, strict=False, seed=2)
    assert (tokens, cached) == (alone(tiny_model, ids, seed=2), 96)


def test_all_texts_of_a_request_can_be_gone_on_with(tiny_model, runner):
    ids = text(8, 40)
    job = runner.start(ids, strict=False, n=3)
    texts = runner.finish_all(job)
    for tokens in texts:
        assert runner.run(ids + tokens + [5], strict=False)[1] == len(ids) + len(tokens) - 1


def test_an_answer_does_not_make_a_prompt_a_branch(tiny_model, runner):
    """A client that gives an answer back otherwise than it was said goes on from the prompt, and nothing piles up."""
    ids = text(9, 40)
    for turn in range(5):
        tokens, cached = runner.run(ids, strict=False, seed=turn)
        assert cached == (0 if not turn else (len(ids) - len(tokens) - CHUNK - 1) // CHUNK * CHUNK)
        ids = ids + [499 - token for token in tokens] + text(10 + turn, CHUNK)
    assert sum(runner.pool.prefixes.counts()) <= 8


def test_an_answer_given_back_a_little_otherwise_is_cut_there(tiny_model, runner):
    """As where a client strips it, or its text has other tokens than were drawn."""
    ids = text(12, 3 * CHUNK)
    tokens, _ = runner.run(ids, strict=False, tokens=64)
    again = ids + tokens[:60] + text(13, 20)
    found, cached = runner.run(again, strict=False)
    assert cached == len(ids) + 60
    session = tiny_model.session("fp16", prefill_chunk=CHUNK)
    for at in range(0, len(ids), CHUNK):
        session.append(ids[at : at + CHUNK])
    for token in tokens[:63]:
        session.append([token])
    session.trim(cached)
    while (done := len(session.tokens)) < len(again):
        session.append(again[done : (done // CHUNK + 1) * CHUNK])
    assert found == [each.token for each in session.generate(None, max_tokens=8, temperature=1.0, seed=1)]
    assert runner.run(again) == (alone(tiny_model, again), 2 * CHUNK)  # and nobody else goes on from that


def test_what_would_have_to_run_anew_is_not_cut(tiny_model, runner, monkeypatch):
    """Layers with a window have forgotten what an earlier end of the text needs."""
    ids = text(14, 3 * CHUNK)
    tokens, _ = runner.run(ids, strict=False, tokens=64)
    monkeypatch.setattr(KVStore, "least_trim", property(lambda store: store.length))
    assert runner.run(ids + tokens[:60] + text(15, 20), strict=False)[1] == 2 * CHUNK


@pytest.mark.parametrize(("strict", "rows"), [(False, PIECE), (True, 2 * PIECE)])
def test_texts_wait_for_a_piece_of_a_prompt_not_for_a_chunk(tiny_model, strict, rows, monkeypatch):
    """While a text is generated a prompt is read by pieces, if nobody may ask for the same answer again."""
    runner, passes = Runner(tiny_model, chunk=2 * PIECE), []
    monkeypatch.setattr(runner.pool, "room_for", lambda appends: passes.append(sum(each[2] for each in appends)))
    runner.gate.clear()
    talking = runner.start([1, 2, 3], tokens=60)
    first = talking.events.get(timeout=120)
    reading = runner.start(text(11, 3 * PIECE), tokens=2, strict=strict)
    runner.gate.set()
    runner.finish(reading)
    runner.finish(talking)
    assert first.done is None
    assert max(passes) == rows + 1
    runner.close()


@pytest.mark.parametrize(
    ("options", "strict"),
    [
        ({}, False),
        ({"seed": 0}, True),
        ({"temperature": 0}, True),
        ({"top_k": 1}, True),
        ({"temperature": 0.5, "top_p": 0.9}, False),
    ],
)
def test_which_requests_are_strict(embedded, options, strict):
    body = {"messages": [{"role": "user", "content": "Where does the captain go?"}], **options}
    runner = Runner(embedded)
    prepared = prepare(parse_generation(body, True, Settings()), embedded, runner.pool, Limits())
    assert [job.strict for job in prepared.jobs] == [strict]
    runner.close()
