"""Text behind text with tokenizers that put a space before a beginning: ids and characters are those of the whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvq.runtime.text.continuing import adds_space, decoded_behind, encoded_behind
from kvq.runtime.text.decoder import StreamingDecoder
from kvq.runtime.text.template import ChatTemplate
from tests.tools.kvdata import examples

LETTERS = "abcdefhilmnoprstuvwyLU:.\n0[]/<>|_"
WORDS = ["▁the", "▁capital", "▁of", "▁Lon", "don", "▁is", "▁a", "th", "he", "er", "in", "▁▁", "Us", "[/"]
MARKS = ["<s>", "</s>", "<|user|>"]


def spaced(kind: str) -> Tokenizer:
    """A sentencepiece-like tokenizer: Llama's legacy form, or one whose space stands at the first text only."""
    alphabet = ["<unk>", *MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "▁"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(alphabet))}
    merges: list[list[str]] = []
    for word in WORDS:  # built from its left end
        for at in range(2, len(word) + 1):
            if word[:at] not in vocab:
                vocab[word[:at]] = len(vocab)
                merges.append([word[: at - 1], word[at - 1]])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    legacy = kind == "legacy"
    document = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [
            {"id": vocab[mark], "content": mark, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": mark != "<|user|>"} for mark in MARKS
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
            if legacy else None,
        "pre_tokenizer": None if legacy else
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(document))


TOKENIZERS = {kind: spaced(kind) for kind in ("legacy", "first")}
texts = st.text(alphabet=LETTERS + "  é", max_size=12) | st.sampled_from(
    ["the capital of", " London", "\nUser: the", ""]
)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_first_new_token_keeps_its_space(kind):
    tokenizer = TOKENIZERS[kind]
    prompt, reply = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("the capital of", "London is"))
    assert tokenizer.decode(reply) == "London is"  # alone it has none
    decoder = StreamingDecoder(tokenizer)
    decoder.follow(prompt)
    assert "".join(map(decoder.push, reply)) + decoder.flush() == " London is"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_space_survives_a_special_token_that_is_skipped(kind):
    tokenizer = TOKENIZERS[kind]
    ids = [*tokenizer.encode("the capital").ids, tokenizer.token_to_id("</s>"), *tokenizer.encode("of a").ids]
    decoder = StreamingDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids) == "the capital of a"


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(first=texts.filter(bool), second=texts)
@examples(200)
def test_a_text_behind_another_one_gets_no_space_of_its_own(kind, first, second):
    """What both say together is what the whole says, whichever ids it has."""
    tokenizer = TOKENIZERS[kind]
    assert adds_space(tokenizer)
    before = tokenizer.encode(first).ids
    ids = encoded_behind(tokenizer, second, None)
    assert tokenizer.decode([*before, *ids]) == tokenizer.decode(before) + second
    assert decoded_behind(tokenizer, before, ids) == second


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(first=texts, second=texts, mark=st.sampled_from(MARKS))
@examples(200)
def test_a_text_behind_an_added_token_is_encoded_as_in_the_whole(kind, first, second, mark):
    tokenizer = TOKENIZERS[kind]
    whole = tokenizer.encode(first + mark + second).ids
    before = tokenizer.encode(first + mark).ids
    assert [*before, *encoded_behind(tokenizer, second, mark)] == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(content=texts)
@examples(100)
def test_pieces_between_quoted_marks_are_encoded_as_in_the_whole(kind, content):
    """A message that quotes a mark is encoded piece by piece; where it quotes none, nothing may be different."""
    template = ChatTemplate("{{ messages[0].content }}<|user|>{{ messages[1].content }}", TOKENIZERS[kind], {})
    quoting = [{"role": "user", "content": "the </s>"}, {"role": "user", "content": content}]
    ids = template.encode(quoting)
    mark = TOKENIZERS[kind].token_to_id("<|user|>")
    assert ids.count(mark) == 1
    assert TOKENIZERS[kind].token_to_id("</s>") not in ids
    plain = template.encode([{"role": "user", "content": "the"}, {"role": "user", "content": content}])
    assert ids[ids.index(mark) :] == plain[plain.index(mark) :]


def test_an_added_token_that_is_not_special_cannot_be_written_by_a_message():
    tokenizer = TOKENIZERS["legacy"]
    template = ChatTemplate("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", tokenizer, {})
    ids = template.encode([{"role": "user", "content": "a <|user|> of </s><|user|>"}])
    assert ids.count(tokenizer.token_to_id("<|user|>")) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<|user|>a<|user|>of</s><|user|>"
