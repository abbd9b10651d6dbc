"""Training windows that are asked about: what is in them, and how many of them there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.controller.training.asked import FORMS, VALUES, asked
from kvq.controller.training.samples import Asking, _with_questions
from kvq.runtime.errors import ContextError
from tests.tools.kvdata import examples

TEXT = " ".join(f"This is sentence number {i}, and it says nothing of any use." for i in range(900)) + "\n"
seeds = st.integers(0, 2**32 - 1)


class Recorded:
    """Encodes a conversation, four characters a token, of which there may be so many, and keeps the last one."""

    def __init__(self, most=10**9):
        self.most = most

    def __call__(self, turns):
        self.text = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
        if len(self.text) > 4 * self.most:
            raise ContextError("too long")
        return [0] * -(-len(self.text) // 4)


def window(length, seed, text=TEXT, most=10**9):
    """The text of a window, or None."""
    encode = Recorded(most)
    found = asked(text, length, encode, np.random.default_rng(seed))
    assert found is None or len(found) == -(-len(encode.text) // 4)
    return None if found is None else encode.text


@given(length=st.integers(300, 1536), seed=seeds, room=st.sampled_from([1, 3]))
@examples(60)
def test_every_answer_stands_in_the_document(length, seed, room):
    text = window(length, seed, most=room * length)
    assert text is not None
    assert 2 * length < len(text) <= 4 * length
    document, *answers = text.removeprefix("<user>").split("<assistant>")
    assert len(answers) == max(2, length // 128)
    for answer in answers:
        value = answer.split("<user>")[0].removeprefix("It is ").split(" is ")[-1].removesuffix(".")
        assert value in document
    assert window(length, seed, most=room * length) == text
    assert window(length, seed + 1) != text


@pytest.mark.parametrize("length", [1, 30, 60])
def test_without_room_for_text_there_is_no_window(length):
    assert window(length, 0) is None


@pytest.mark.parametrize("text", ["", "Short.", "word " * 50])
def test_a_text_without_sentences_to_spare_gives_none(text):
    assert window(4000, 0, text) is None


def test_forms_and_values_can_be_told_from_each_other():
    said = [form.format(who="Ada", what="price", value="5") for form, _ in FORMS]
    assert len(set(said)) == len(FORMS)
    assert all("Ada" in each and "5" in each for each in said)
    rng = np.random.default_rng(0)
    assert all(value(rng) for value in VALUES.values())


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_a_share_of_the_windows_is_asked_about(share):
    plain = [np.zeros(length, np.int64) for length in (1500, 3000) * 10]
    found = _with_questions(list(plain), TEXT, Asking(share, Recorded()), seed=0)
    replaced = [new is not old for new, old in zip(found, plain, strict=True)]
    assert sum(replaced) == round(share * len(plain))
    assert all(len(new) <= len(old) for new, old in zip(found, plain, strict=True))


def test_windows_without_room_stay():
    plain = [np.zeros(40, np.int64)] * 4
    assert _with_questions(list(plain), TEXT, Asking(1, Recorded()), seed=0) == plain
