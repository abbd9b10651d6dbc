"""Tokenizers made to run for ever, to fill memory, or to fail: refused by name when they are loaded, or do."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

import kvq
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.errors import TokenizerError
from kvq.runtime.text.patterns import wrong_patterns
from kvq.runtime.text.tokenizer import MOST_ADDED, decoded, encoded, guarded, load_tokenizer
from tests.tools.checkpoints import small_tokenizer
from tests.tools.work import bounded_work


def document(**parts) -> dict:
    """A small tokenizer.json with some parts replaced; model: what is different in it."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {"a": 0, "b": 1}, "merges": []}  # fmt: skip
    found = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": None, "post_processor": None, "decoder": None}  # fmt: skip
    return found | parts | {"model": model | parts.get("model", {})}


def split(pattern: str) -> dict:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def replacing(content: str, count: int, pattern: dict) -> dict:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * count}}


def whole(kind: str, **model) -> dict:
    return {**document(), "model": {"type": kind, **model}}


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
BAD = {
    "nothing": "",
    "no JSON": "{",
    "deep JSON": "[" * 100_000,
    "a list": [],
    "no model": {},
    "a model of a list": {"model": []},
    "a model that nobody knows": whole("Neural", vocab={}),
    "exponential: a repetition repeated": document(**split("(a+)+$")),
    "exponential: a choice repeated": document(**split("(a|aa)+$")),
    "exponential: a star of a star": document(**split("(?:a*)*c")),
    "exponential: repeated inside": document(**split("((((a+)))?b?)*c")),
    "exponential: counted": document(**split("((a{1,999}){1,999}){1,999}")),
    "exponential: open counts": document(**split("(?:(?:a{2,}){2,})c")),
    "exponential: with a name": document(**split("(?<x>a+)+$")),
    "exponential: within a look ahead": document(**split("(?=(a+)+$)a")),
    "exponential: behind a class": document(**split(r"[)(]+(\s+)*$")),
    "exponential: in a decoder": document(decoder={"type": "Replace", "pattern": {"Regex": "(a+)+c"}, "content": ""}),
    "exponential: in a normalizer": document(**replacing("", 1, {"Regex": "(a|a)*c"})),
    "exponential: in a sequence": document(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Sequence", "pretokenizers": [split("(a+)+$")["pre_tokenizer"]]}]}),
    "cubic: blanks twice": document(**split(r"\s*\s*x")),
    "cubic: any three times": document(**split(r"^.*.*.*=")),
    "cubic: letters behind a choice": document(**split(r"(?:a|b)\w*\w*!")),
    "cubic: words": document(**split(r"(?:ab)*(?:ab)*c")),
    "cubic: without greed": document(**split(r"a*?a*?x")),
    "cubic: in a normalizer": document(**replacing("", 1, {"Regex": r"\d*\d*\d*\d*z"})),
    "cubic: ideographs": document(**split(r"[一-龥]+[一-龥]+[一-龥]+。")),
    "a reference back": document(**split(r"(?=(a+))\1{2,}c")),
    "a reference by name": document(**split(r"(?<x>a)\k<x>+")),
    "a call of a group": document(**split(r"(?<x>a\g<x>?b)")),
    "a pattern without end": document(**split("a" * 100_000)),
    "doubling": document(**replacing("aa", 40, {"String": "a"})),
    "doubling between any two characters": document(**replacing("a", 40, {"Regex": ""})),
    "one long replacement": document(**replacing("x" * 100_000, 1, {"String": "a"})),
    "many steps": document(**replacing("a", 1000, {"String": "a"})),
    "dropped merges": document(model={"dropout": 0.5}),
    "WordPiece without an unknown token": whole("WordPiece", unk_token="[UNK]", continuing_subword_prefix="##",
                                                max_input_chars_per_word=100, vocab={"a": 0}),
    "WordLevel without an unknown token": whole("WordLevel", unk_token="?", vocab={"a": 0}),
    "Unigram of nothing": whole("Unigram", unk_id=0, vocab=[], byte_fallback=False),
    "Unigram without an unknown token": whole("Unigram", unk_id=None, vocab=[["a", 0.0]], byte_fallback=False),
    "Unigram whose unknown token is not there": whole("Unigram", unk_id=5, vocab=[["a", 0.0]], byte_fallback=False),
    "a vocabulary of a list": document(model={"vocab": [1, 2]}),
    "a merge of tokens that are not there": document(model={"merges": [["x", "y"]]}),
    "a thousand tokens in front": document(post_processor=TEMPLATE | {
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 1000,
        "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}}}),
    "a token that is a thousand": document(post_processor=TEMPLATE | {
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}],
        "special_tokens": {"a": {"id": "a", "ids": [0] * 1000, "tokens": ["a"] * 1000}}}),
    "too many added tokens": document(added_tokens=[{}] * (MOST_ADDED + 1)),
    "added tokens of text": document(added_tokens="abc"),
    "a step that nobody knows": document(normalizer={"type": "Nothing"}),
    "a pattern that is none": document(**split("(")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_without_bounds_is_refused_at_once(name):
    text = BAD[name] if isinstance(BAD[name], str) else json.dumps(BAD[name])
    with bounded_work(), pytest.raises(TokenizerError) as caught:
        load_tokenizer(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# Regular expressions of published tokenizers: GPT-2's, Llama 3's, GPT-4o's, DeepSeek's, Bloom's, CLIP's.
PUBLISHED = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"(?:\r?\n)+(?!\r?\n)|\d{1,3}(?=(?:\d{3})*\b)|[一-龥]+",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_patterns_of_published_tokenizers_are_read(pattern):
    tokenizer = load_tokenizer(json.dumps(document(**split(pattern))))
    assert encoded(tokenizer, "ab") == [0, 1]


@pytest.mark.parametrize("pattern", [r"\s+$", r"^\s+|\s+$", r"[a-z]*[A-Z]*\d*", r"(?:ab)+", r"\s*[\r\n]+"])
def test_patterns_of_quadratic_time_are_read(pattern):
    assert wrong_patterns([pattern]) == ("", "")


def test_a_panic_of_the_library_is_an_error_of_ours():
    """As a regular expression raises it that got past the check."""
    pattern = json.dumps(document(**split("(a+)+$")))
    tokenizer = Tokenizer.from_str(pattern)
    with pytest.raises(TokenizerError, match="retry-limit"):
        encoded(tokenizer, "a" * 5000 + "b")
    with pytest.raises(TokenizerError, match="to decode"):
        decoded(tokenizer, [1 << 40])
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "to stop")


def test_a_bundle_with_such_a_tokenizer_is_refused_by_name(tiny_bundle, tmp_path):
    """The file's own digest is right, as a stranger would make it."""
    import hashlib
    import shutil

    from kvq.composition import open_bundle

    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    text = json.dumps(BAD["exponential: a repetition repeated"])
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "tokenizer.json").write_text(text)
    entry = manifest["files"]["tokenizer.json"]
    entry |= {"sha256": hashlib.sha256(text.encode()).hexdigest()} | (
        {"nbytes": len(text)} if "nbytes" in entry else {}
    )
    entry |= {"size": len(text)} if "size" in entry else {}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(kvq.BundleError, match=r"tokenizer\.json cannot be read .*repeats a group"):
        open_bundle(folder)


def test_a_long_text_is_encoded_whole_if_it_may_fit():
    tokenizer = small_tokenizer()
    text = "the lighthouse " * 5000
    ids = tokenizer.encode(text).ids
    assert encoded(tokenizer, text, most=len(ids)) == encoded(tokenizer, text) == ids
    with pytest.raises(kvq.ContextError, match="has more than 100 tokens"):
        encoded(tokenizer, text, most=100)
