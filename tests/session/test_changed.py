"""A text that is changed while it is generated, or whose step is interrupted, is told of: never gone on with."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import kvq
from kvq.runtime.session import appending, drafted, drafting, generation, session

IDS = list(range(1, 31))
CHANGES = {
    "append": lambda session: session.append([7, 8]),
    "trim": lambda session: session.trim(5),
    "trim to nothing": lambda session: session.trim(0),
    "another generation": lambda session: list(session.generate([9], max_tokens=2)),
    "the rest of it": lambda session: list(session.generate(None, max_tokens=2)),
    "taking back": lambda session: session.pending.clear(),
}


@pytest.mark.parametrize("draft", ["off", "auto"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_generation_whose_text_was_changed_ends_with_an_error(embedded, name, draft):
    session = embedded.session("int8")
    responses = session.generate(IDS, max_tokens=10, draft=draft)
    for _ in range(3):
        next(responses)
    CHANGES[name](session)
    with pytest.raises(kvq.SessionError, match="changed while it generated"):
        next(responses)
    assert len(list(session.generate([3], max_tokens=2, ignore_eos=True))) == 2


@pytest.mark.parametrize("name", ["fork", "save", "stats"])
def test_looking_at_it_changes_nothing(embedded, name, tmp_path):
    session, alone = embedded.session("int8"), embedded.session("int8")
    look = {"fork": session.fork, "save": lambda: session.save(tmp_path / "text.kvq"), "stats": session.stats}[name]
    found = []
    for response in session.generate(IDS, max_tokens=8, seed=3):
        look()
        found.append(response.token)
    assert found == [response.token for response in alone.generate(IDS, max_tokens=8, seed=3)]


TRACED = {module.__file__ for module in (appending, drafted, drafting, generation, session)}


def interrupted(session, event):
    """Generates three tokens, interrupted before the event-th line; whether it came that far."""
    left = event

    def trace(frame, kind, _argument):
        nonlocal left
        file = frame.f_code.co_filename
        if file not in TRACED and "/kv/" not in file and "/policy/" not in file:
            return None
        left -= kind == "line"
        if kind == "line" and left == 0:
            sys.settrace(before)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        list(session.generate(None, max_tokens=3, temperature=0))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def greedy(session):
    return [response.token for response in session.generate(None, max_tokens=4, temperature=0)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "adaptive"])
def test_an_interrupt_at_any_line_leaves_the_text_or_an_error(embedded, policy, tmp_path):
    """What goes on, or is saved, is the text that its tokens are."""
    first = embedded.session(policy)
    first.append(IDS)
    greedy(first)
    went_on, told, messages = 0, 0, set()
    for event in range(1, 5000, 3):
        session = first.fork()
        if not interrupted(session, event):
            break
        held = [*session.tokens, *session.pending]
        try:
            session.save(tmp_path / "text.kvq")
            found = greedy(session)
        except (kvq.SessionError, kvq.PromptError) as error:
            messages.add(str(error).partition(" after ")[0])
            told += 1
            continue
        expected = embedded.session(policy)
        expected.append(held)
        assert found == greedy(expected)
        went_on += 1
    assert went_on > 20
    assert told > 20
    assert all("interrupted in the middle" in each or "the last append ended" in each for each in messages)


def test_an_interrupted_session_can_begin_again(embedded):
    session, fresh = embedded.session("int8"), embedded.session("int8")
    session.append(IDS)
    keep = session.store.append

    def interrupt(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    session.store.append = interrupt
    with pytest.raises(KeyboardInterrupt):
        session.append([5])
    session.store.append = keep
    for use in (lambda: session.append([5]), lambda: session.trim(3), session.fork, lambda: session.generate(None)):
        with pytest.raises(kvq.SessionError, match=r"trim\(0\)"):
            use()
    session.trim(0)
    np.testing.assert_array_equal(session.append(IDS), fresh.append(IDS))


def test_an_append_that_was_given_up_says_so(embedded):
    session = embedded.session("int8", prefill_chunk=8)

    def stop(done, _total):
        if done == 16:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        session.append(IDS, progress=stop)
    with pytest.raises(kvq.PromptError, match="ended after 16 tokens"):
        session.generate(None)
    whole = embedded.session("int8", prefill_chunk=8)
    np.testing.assert_array_equal(session.append(IDS[16:]), whole.append(IDS))
