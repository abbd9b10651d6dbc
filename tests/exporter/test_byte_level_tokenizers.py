"""Byte-level tokenizers of GGUF files and of vocab.json + merges.txt: ids equal to those of the originals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer, normalizers

from kvq.exporter.sources.pretokenizers import PRE_TOKENIZERS
from kvq.exporter.sources.tokenizers import from_gguf, from_vocab_and_merges
from kvq.runtime.errors import CheckpointError
from tests.tools.checkpoints import small_tokenizer
from tests.tools.packages import needs
from tests.tools.shared_data import shared_file
from tests.tools.tokenizer_texts import CONTROL, MANY, PARTS, TEXT, USER, assert_same, one_line


def gguf_fields(tokenizer: Tokenizer, pre: str) -> dict[str, object]:
    """What llama.cpp's converter writes for a byte-level tokenizer."""
    data = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    types = dict.fromkeys(vocab, 1) | {entry["content"]: 3 if entry["special"] else 4 for entry in data["added_tokens"]}
    texts = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [types[text] for text in texts],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab[CONTROL[0]],
        "tokenizer.ggml.eos_token_id": vocab[CONTROL[1]],
    }


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in USER])
    return tokenizer


@pytest.fixture(scope="module")
def fields(original) -> dict[str, object]:
    return gguf_fields(original, "smollm")


@pytest.fixture(scope="module")
def converted(fields) -> Tokenizer:
    return Tokenizer.from_str(from_gguf(fields, "a.gguf"))


@pytest.mark.slow
@MANY
@given(text=TEXT)
def test_byte_level_there_and_back(original, converted, text):
    assert_same(text, converted, original)
    assert converted.decode(converted.encode(text).ids, skip_special_tokens=False) == text


def test_byte_level_json_is_the_original(original, fields):
    ours, theirs = json.loads(from_gguf(fields, "a.gguf")), json.loads(original.to_str())
    # Added tokens outside the model's vocabulary are inside it in a GGUF file, which has one list of tokens.
    extra = set(ours["model"].pop("vocab")) - set(theirs["model"].pop("vocab"))
    assert extra == set(USER)
    assert ours == theirs


def test_bytes_that_the_vocabulary_lacks_are_left_out(fields):
    """As SmolLM's tokenizer does it, whose vocabulary has no 0x04: no unknown token, nothing."""
    symbol = "Ą"  # 0x04 in GPT-2's alphabet
    vocabulary = fields["tokenizer.ggml.tokens"]
    assert symbol in vocabulary
    lacking = fields | {
        "tokenizer.ggml.tokens": [text if text != symbol else "[unused]" for text in vocabulary],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = Tokenizer.from_str(from_gguf(lacking, "a.gguf"))
    assert tokenizer.encode("a\x04b").ids == tokenizer.encode("a").ids + tokenizer.encode("b").ids


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        (
            "smollm",
            ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠHelloWorld", "/", "d", "ĠE", "'", "LL", "Ċ", "Ġ!!", "Ċ"],
        ),
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġ", "ĠHelloWorld", "/", "d", "ĠE", "'", "LL", "Ċ", "Ġ!!", "Ċ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġ", "ĠHelloWorld", "/d", "ĠE", "'LL", "Ċ", "Ġ!!Ċ"]),
        ("dbrx", ["It", "'s", "Ġ", "123", "4", "Ġ", "ĠHelloWorld", "/d", "ĠE", "'LL", "Ċ", "Ġ!!Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠHelloWorld", "/d", "ĠE", "'LL", "Ċ", "Ġ!!Ċ"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠHello", "World", "/d", "ĠE", "'LL", "Ċ", "Ġ!!Ċ"]),
        ("gpt-4o", ["It's", "Ġ", "123", "4", "Ġ", "ĠHello", "World", "/d", "ĠE'LL", "Ċ", "Ġ!!Ċ"]),
        (
            "deepseek-coder",
            ["It", "'", "s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠHelloWorld", "/", "d", "ĠE", "'", "LL", "Ċ", "Ġ!!", "Ċ"],
        ),
    ],
)
def test_where_words_are_cut(fields, pre, words):
    tokenizer = Tokenizer.from_str(from_gguf(fields | {"tokenizer.ggml.pre": pre}, "a.gguf"))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234  HelloWorld/d E'LL\n !!\n")
    assert [word for word, _ in cut] == words


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_no_pre_tokenizer_loses_text(fields, pre):
    tokenizer = Tokenizer.from_str(from_gguf(fields | {"tokenizer.ggml.pre": pre}, "a.gguf"))
    text = unicodedata.normalize("NFC", "".join(PARTS[5:]))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_bos_and_eos(original, fields):
    vocab = original.get_vocab()
    bos, eos, plain = vocab[CONTROL[0]], vocab[CONTROL[1]], original.encode("sea").ids

    def ids(**changes: object) -> list[int]:
        changed = fields | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return Tokenizer.from_str(from_gguf(changed, "a.gguf")).encode("sea").ids

    assert ids() == plain
    assert ids(add_bos_token=True) == [bos, *plain]
    assert ids(add_bos_token=True, add_eos_token=True) == [bos, *plain, eos]
    assert ids(pre="llama-bpe") == [bos, *plain]
    assert ids(pre="llama-bpe", add_bos_token=False) == plain


def test_a_word_of_the_vocabulary_is_one_token_where_merges_are_ignored(fields):
    word = "Ġzzyzx"
    vocabulary = [*fields["tokenizer.ggml.tokens"], word]
    types = [*fields["tokenizer.ggml.token_type"], 1]
    added = fields | {"tokenizer.ggml.tokens": vocabulary, "tokenizer.ggml.token_type": types}
    for pre, one in (("llama-bpe", True), ("smaug-bpe", False)):
        tokenizer = Tokenizer.from_str(from_gguf(added | {"tokenizer.ggml.pre": pre}, "a.gguf"))
        assert (tokenizer.encode(" zzyzx", add_special_tokens=False).tokens == [word]) is one


def test_qwen2_is_normalized(fields):
    tokenizer = Tokenizer.from_str(from_gguf(fields | {"tokenizer.ggml.pre": "qwen2"}, "a.gguf"))
    assert isinstance(tokenizer.normalizer, normalizers.NFC)
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_tokens_without_text_and_without_types(fields):
    """llama.cpp names the former by their id; without types BOS and EOS are special."""
    vocabulary = [*fields["tokenizer.ggml.tokens"], "", ""]
    bare = {k: v for k, v in fields.items() if k != "tokenizer.ggml.token_type"} | {"tokenizer.ggml.tokens": vocabulary}
    tokenizer = Tokenizer.from_str(from_gguf(bare, "a.gguf"))
    assert tokenizer.token_to_id(f"[EMPTY_{len(vocabulary) - 1}]") == len(vocabulary) - 1
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(CONTROL)


# The real file, where both it and the published tokenizer are at hand.


def test_smollm2_file_gives_the_published_tokenizer():
    file = os.environ.get("KVQ_TEST_GGUF")
    if not file:
        pytest.skip("set KVQ_TEST_GGUF to a GGUF file of SmolLM2")
    gguf = needs("gguf")
    published = json.loads(shared_file("tokenizer", "tokenizer.json").read_text())
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    ours = json.loads(from_gguf(fields, file))
    ours["model"]["merges"] = [" ".join(merge) for merge in ours["model"]["merges"]]
    assert ours == published  # every setting, hence every id of every text
    for prompt in json.loads(shared_file("tokenizer", "golden_ids.json").read_text())["prompts"]:
        assert Tokenizer.from_str(json.dumps(ours)).encode(prompt["text"]).ids == prompt["input_ids"]


# vocab.json and merges.txt


def test_vocab_and_merges_give_the_ids_of_transformers(original, tmp_path):
    transformers = needs("transformers")
    data = json.loads(original.to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in data["merges"]), ""])
    vocab = json.dumps(data["vocab"])
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path).backend_tokenizer
    tokenizer = Tokenizer.from_str(from_vocab_and_merges(vocab, merges, "folder", special=["<|endoftext|>"]))

    @settings(max_examples=200, deadline=None)
    @given(text=TEXT)
    def check(text):
        assert_same(text, tokenizer, theirs)

    check()


def test_vocab_and_merges(original):
    data = json.loads(original.to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(m if isinstance(m, str) else " ".join(m) for m in data["merges"]) + "\n"
    text = from_vocab_and_merges(json.dumps(data["vocab"]), merges, "folder", special=["<|endoftext|>"])
    tokenizer = Tokenizer.from_str(text)
    for text in ("".join(PARTS), *PARTS):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|endoftext|>").ids == [data["vocab"]["<|endoftext|>"]]
    assert from_vocab_and_merges(json.dumps(data["vocab"]), merges.replace("\n", "\r\n"), "folder") == (
        from_vocab_and_merges(json.dumps(data["vocab"]), merges.partition("\n")[2], "folder")
    )


@pytest.mark.parametrize(
    ("vocab", "merges", "special", "why"),
    [
        ("{", "", [], "not valid JSON"),
        ("[" * 100_000, "", [], "not valid JSON"),
        ("[]", "", [], "no object of token ids"),
        ('{"a": "1"}', "", [], "no object of token ids"),
        ('{"a": -1}', "", [], "no object of token ids"),
        ('{"a": true}', "", [], "no object of token ids"),
        ('{"a": 4294967296}', "", [], "no object of token ids"),
        ("{}", "", [], "no tokens"),
        ('{"a": 0, "b": 0}', "", [], "an id twice"),
        ('{"\\ud800": 0}', "", [], "not Unicode"),
        ('{"a": 0, "b": 1}', "#version: 0.2\na b", [], "no token 'ab'"),
        ('{"a": 0, "ab": 1}', "a b", [], "no token 'b'"),
        ('{"a": 0}', "a", [], "line 1 of merges.txt is 'a', not two tokens"),
        ('{"a": 0}', "#version\n\na ", [], "line 3 of merges.txt"),
        ('{"a": 0}', "", ["b"], "special token 'b' is not in vocab.json"),
    ],
)
def test_damaged_vocab_and_merges(vocab, merges, special, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        from_vocab_and_merges(vocab, merges, "folder", special=special)
    one_line(caught.value)


def test_conversion_needs_no_other_library():
    code = (
        "import sys, kvq.exporter.sources.tokenizers;"
        "print([m for m in ('torch', 'transformers', 'sentencepiece', 'gguf', 'google.protobuf') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
