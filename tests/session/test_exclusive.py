"""A session that one thread is using is refused to another one, which changes nothing."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvq.runtime.errors import SessionError

IDS = list(range(1, 41))
USES = {
    "append": lambda session, _: session.append([1]),
    "generate": lambda session, _: next(session.generate([1], max_tokens=1)),
    "trim": lambda session, _: session.trim(2),
    "fork": lambda session, _: session.fork(),
    "save": lambda session, folder: session.save(folder / "text.kvq"),
    "step": lambda session, _: session.model.step([(session.model.session("int8"), [1]), (session, [1])]),
}


def elsewhere(use):
    """What a call raises in another thread; None where it goes through."""
    raised = [None]

    def call():
        try:
            use()
        except Exception as error:
            raised[0] = error

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0]


@pytest.mark.parametrize("name", USES)
def test_another_thread_is_refused_while_a_text_is_appended(tiny_model, tmp_path, name):
    session, alone = (tiny_model.session("int8", prefill_chunk=8) for _ in range(2))
    found = []
    session.append(IDS, progress=lambda *_: found.append(elsewhere(lambda: USES[name](session, tmp_path))))
    assert len(found) == 5
    for error in found:
        assert isinstance(error, SessionError), error
        assert "another thread is using this session" in str(error)
    assert list(tmp_path.iterdir()) == []
    alone.append(IDS)
    assert session.tokens == IDS
    np.testing.assert_array_equal(session.append([7]), alone.append([7]))
    assert elsewhere(lambda: USES[name](session, tmp_path)) is None  # its turn now


def test_the_thread_that_uses_it_may_use_it_meanwhile(tiny_model):
    session, forks = tiny_model.session("int8", prefill_chunk=8), []
    session.append(IDS, progress=lambda *_: forks.append(session.fork()))
    assert [len(fork.tokens) for fork in forks] == [8, 16, 24, 32, 40]


def test_threads_may_take_turns(tiny_model):
    session, alone = tiny_model.session("int8"), tiny_model.session("int8")
    for start in range(0, 40, 8):
        assert elsewhere(lambda start=start: session.append(IDS[start : start + 8])) is None
        alone.append(IDS[start : start + 8])
    np.testing.assert_array_equal(session.append([7]), alone.append([7]))


def test_a_call_that_fails_lets_go(tiny_model):
    session = tiny_model.session("int8", prefill_chunk=8)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.append(IDS, progress=stop)
    assert elsewhere(lambda: session.append([7])) is None
