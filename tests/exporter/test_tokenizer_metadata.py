"""A tokenizer's metadata in GGUF files: small, damaged, mutated, and larger than it may be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvq.exporter.sources import pieces
from kvq.exporter.sources.pretokenizers import PRE_TOKENIZERS
from kvq.exporter.sources.tokenizers import from_gguf
from kvq.runtime.errors import CheckpointError, KvqError, UnsupportedArchitectureError
from tests.tools.tokenizer_texts import one_line

GPT2 = {
    "model": "gpt2", "pre": "smollm", "tokens": ["<e>", "a", "b", "ab"], "token_type": [3, 1, 1, 1], "merges": ["a b"],
    "bos_token_id": 0, "eos_token_id": 0, "unknown_token_id": 0, "padding_token_id": 0, "add_bos_token": False,
    "add_eos_token": False, "add_space_prefix": False,
}  # fmt: skip
LLAMA = {
    "model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"], "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "token_type": [2, 3, 3, 1, 1, 1], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
}  # fmt: skip


def metadata(base: dict, **changes: object) -> dict[str, object]:
    return {f"tokenizer.ggml.{k}": v for k, v in (base | changes).items() if v is not None}


def test_small_metadata():
    assert Tokenizer.from_str(from_gguf(metadata(GPT2), "a.gguf")).encode("ab<e>").ids == [3, 0]
    assert Tokenizer.from_str(from_gguf(metadata(LLAMA), "a.gguf")).encode("ab</s>").ids == [1, 0, 5, 2]
    few = {
        "model": "llama",
        "tokens": LLAMA["tokens"],
        "scores": LLAMA["scores"],
    }  # llama.cpp's ids where none are given
    assert Tokenizer.from_str(from_gguf(metadata(few), "a.gguf")).encode("ab</s>").ids == [1, 0, 5, 2]
    twice = metadata(GPT2, tokens=["<e>", "a", "b", "ab", "aba"], token_type=None, merges=["a b", "ab a", "a b"])
    assert Tokenizer.from_str(from_gguf(twice, "a.gguf")).encode("aba").ids == [4]  # the first of two counts
    assert from_gguf(metadata(GPT2, padding_token_id=-1), "a.gguf")  # nothing here pads


@pytest.mark.parametrize(
    ("base", "changes", "kind", "why"),
    [
        (GPT2, {"model": None}, CheckpointError, "lacks tokenizer.ggml.model"),
        (GPT2, {"model": 1}, CheckpointError, "tokenizer.ggml.model is int, not text"),
        (GPT2, {"model": "bert"}, UnsupportedArchitectureError, "'bert' of a.gguf is not known; known: gpt2"),
        (GPT2, {"pre": None}, UnsupportedArchitectureError, "does not say how its tokenizer cuts"),
        (GPT2, {"pre": "default"}, UnsupportedArchitectureError, "says 'default'"),
        (GPT2, {"pre": "xyz"}, UnsupportedArchitectureError, "pre-tokenizer 'xyz' of a.gguf is not known; known: code"),
        (GPT2, {"pre": ["smollm"]}, CheckpointError, "pre is list, not text"),
        (GPT2, {"tokens": None}, CheckpointError, "lacks tokenizer.ggml.tokens"),
        (GPT2, {"tokens": "abc"}, CheckpointError, "tokens is str, not a list"),
        (GPT2, {"tokens": ["<e>", b"a", "b", "ab"]}, CheckpointError, "value 1 of tokenizer.ggml.tokens is bytes"),
        (GPT2, {"tokens": []}, CheckpointError, "no tokens"),
        (GPT2, {"tokens": ["<e>", "a", "a", "ab"]}, CheckpointError, "token 2 has the text 'a' of token 1"),
        (GPT2, {"tokens": ["<e>", "a", "b", "ab", "\ud800"]}, CheckpointError, "not Unicode"),
        (GPT2, {"token_type": [3]}, CheckpointError, "token_type has 1 values for 4 tokens"),
        (GPT2, {"token_type": [3, 1, 1, 1.0]}, CheckpointError, "value 3 of tokenizer.ggml.token_type is float"),
        (GPT2, {"token_type": [3, 1, 1, 7]}, CheckpointError, "token 3 has the type 7"),
        (GPT2, {"token_type": 3}, CheckpointError, "token_type is int, not a list"),
        (GPT2, {"merges": None}, CheckpointError, "lacks tokenizer.ggml.merges"),
        (GPT2, {"merges": ["ab"]}, CheckpointError, "merge 0 is 'ab', not two tokens"),
        (GPT2, {"merges": ["a b", ""]}, CheckpointError, "merge 1 is '', not two tokens"),
        (GPT2, {"merges": [("a", "b")]}, CheckpointError, "value 0 of tokenizer.ggml.merges is tuple"),
        (GPT2, {"merges": ["a c"]}, CheckpointError, "merges 'a' and 'c', but has no token 'c'"),
        (GPT2, {"merges": ["b a"]}, CheckpointError, "merges 'b' and 'a', but has no token 'ba'"),
        (GPT2, {"bos_token_id": 4}, CheckpointError, "bos_token_id is 4, of 4 tokens"),
        (GPT2, {"eos_token_id": -1}, CheckpointError, "eos_token_id is -1, of 4 tokens"),
        (GPT2, {"unknown_token_id": 10**400}, CheckpointError, "unknown_token_id is out of range, of 4 tokens"),
        (GPT2, {"bos_token_id": "0"}, CheckpointError, "bos_token_id is str, not a token id"),
        (GPT2, {"add_bos_token": 1}, CheckpointError, "add_bos_token is int, not true or false"),
        (GPT2, {"add_bos_token": True, "bos_token_id": None}, CheckpointError, "lacks tokenizer.ggml.bos_token_id"),
        (GPT2, {"add_eos_token": True, "eos_token_id": None}, CheckpointError, "lacks tokenizer.ggml.eos_token_id"),
        (LLAMA, {"scores": None}, CheckpointError, "lacks tokenizer.ggml.scores"),
        (LLAMA, {"scores": [0.0]}, CheckpointError, "scores has 1 values for 6 tokens"),
        (LLAMA, {"scores": [0.0] * 5 + [float("nan")]}, CheckpointError, "token 5 has the score nan"),
        (LLAMA, {"scores": [0.0] * 5 + [10**400]}, CheckpointError, "token 5 has a score out of range"),
        (LLAMA, {"token_type": [2, 3, 3, 1, 1, 99]}, CheckpointError, "token 5 has the type 99"),
        (LLAMA, {"unknown_token_id": 6}, CheckpointError, "unknown_token_id is 6, of 6 tokens"),
        (LLAMA, {"add_space_prefix": 0}, CheckpointError, "add_space_prefix is int, not true or false"),
        (LLAMA, {"tokens": ["<unk>", "<s>", "</s>", "a", "b", "c" * 513]}, CheckpointError, "513 characters"),
    ],
)
def test_damaged_metadata(base, changes, kind, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        from_gguf(metadata(base, **changes), "a.gguf")
    assert type(caught.value) is kind
    one_line(caught.value)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(), st.floats(), st.text(max_size=5),
    st.binary(max_size=2),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-1, 9), st.floats(), st.none()), max_size=7),
    st.sampled_from(["gpt2", "llama", *sorted(PRE_TOKENIZERS)]),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(base=st.sampled_from([GPT2, LLAMA]), data=st.data())
def test_mutated_metadata_raises_nothing_else(base, data):
    changed = dict(base)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(GPT2 | LLAMA)))
        value = changed.get(key)
        if isinstance(value, list) and value and data.draw(st.booleans()):  # one value of a list
            changed[key] = list(value)
            changed[key][data.draw(st.integers(0, len(value) - 1))] = data.draw(
                st.one_of(ODD, st.sampled_from(["", "a", "a b", " a b", "<s>", 0, 2, 6, 1e300, float("inf")]))
            )
        else:
            changed[key] = data.draw(ODD)
    try:
        tokenizer = Tokenizer.from_str(from_gguf(metadata(changed), "a.gguf"))
    except KvqError as error:
        one_line(error)
    else:
        tokenizer.decode(tokenizer.encode("ab <e> </s>\x00é").ids)


def test_sizes_are_bounded(monkeypatch):
    """No vocabulary makes the conversion take minutes or gigabytes."""
    tokens = ["<unk>", "<s>", "</s>", *("a" * i for i in range(1, 40))]
    run = metadata(LLAMA, tokens=tokens, scores=[0.0] * len(tokens), token_type=None)
    assert from_gguf(run, "a.gguf")
    for bound in ("MOST_PIECES", "MOST_CHARACTERS", "MOST_MERGES"):
        with monkeypatch.context() as patch:
            patch.setattr(pieces, bound, 20)
            with pytest.raises(CheckpointError, match=r"more than 20 (tokens|merges)|or more than \d+ characters"):
                from_gguf(run, "a.gguf")
    many = 40_000
    control = metadata(LLAMA, tokens=[f"<{i}>" for i in range(many)], scores=[0] * many, token_type=[3] * many)
    with pytest.raises(CheckpointError, match="control and user-defined tokens, more than 32768"):
        from_gguf(control, "a.gguf")
