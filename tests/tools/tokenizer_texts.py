"""Texts on which tokenizers differ, and comparing two of them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>"]
USER = ["<tool>", "==="]
# Words that a tokenizer cuts in one way and its neighbour in another, and texts of special tokens.
PARTS = [
    *CONTROL, *USER, "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x41>", "▁", " ", "  ", "\n", "\r\n", " \t", "\x00",
    "\x04",
    "1234", "3.14", "٣", "½²", "it's", "I'LL", "HelloWorld", " the", "e\u0301", "漢字", "🦙👩‍👩‍👧", "سلام", "\u3000",
    "ſ's", "/d",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(PARTS)), max_size=12).map("".join)
MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(text: str, ours: Tokenizer, theirs: Tokenizer) -> None:
    """Ids and decoded text of two tokenizers."""
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text).ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 500
