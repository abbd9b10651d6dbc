"""An error is one line that can be printed, whatever a stranger has put into it."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvq
from kvq.runtime import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, kvq.KvqError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(text=st.text(st.characters(), max_size=40))
def test_a_message_can_be_printed(kind, text):
    said = str(kind(f"the file {text} is damaged; make it anew"))
    assert said.isprintable()
    assert said.encode()
    if text.isprintable():
        assert text in said


def test_what_cannot_be_printed_is_written_out():
    said = str(kvq.CheckpointError("a\nb\x1b[2Jc\ud800\u202ed"))
    assert said == "a b\\x1b[2Jc\\ud800\\u202ed"
    assert len(str(kvq.CheckpointError("x" * 10**6))) == errors.LONGEST_MESSAGE


def test_errors_go_between_processes():
    again = pickle.loads(pickle.dumps(errors.RequestError("a\nb", 404, "code", "param")))
    assert (str(again), again.status, again.code, again.param) == ("a b", 404, "code", "param")
