"""Tokenizers whose work multiplies: by nesting, by what they put in place of text, by long parts and many of them.

Each is refused when it is loaded, before any text. What published tokenizers are made of is not.
"""

from __future__ import annotations

import base64
import json
import random
import re
import struct
import tracemalloc

import pytest

from kvq.runtime.errors import TokenizerError
from kvq.runtime.text.forms import wrong_form
from kvq.runtime.text.markers import Markers
from kvq.runtime.text.patterns import wrong_patterns
from kvq.runtime.text.template import GUARD, ChatTemplate
from kvq.runtime.text.tokenizer import decoded, encoded, load_tokenizer
from tests.attacks.test_tokenizers import TEMPLATE, document, replacing, split, whole
from tests.tools.work import LITTLE, bounded_work

SECOND = LITTLE // 4  # turns of a loop
LITTLE_MEMORY = 60 << 20  # bytes, what Python makes of the text included


def nested(step: dict, holds: str, depth: int) -> dict:
    for _ in range(depth):
        step = {"type": "Sequence", holds: [step]}
    return step


def added(content: str, index: int, **changed) -> dict:
    return {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True} | changed  # fmt: skip


def table(trie: bytes, text: bytes, size: int | None = None) -> dict:
    data = struct.pack("<I", len(trie) if size is None else size) + trie + text
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def replace(content: str, pattern: dict | None = None) -> dict:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def pieces(*single) -> dict:
    return TEMPLATE | {"single": list(single), "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}}}


def wordpiece(**changed) -> dict:
    model = {"unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return whole("WordPiece", **model | {"vocab": {"?": 0, "a": 1, "##a": 2}} | changed)


def unigram(texts) -> dict:
    return whole("Unigram", unk_id=0, byte_fallback=False, vocab=[["?", 0.0], *([text, -1.0] for text in texts)])


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
DOUBLING = {"type": "Sequence", "normalizers": [replace("aa")] * 40}
DECODING = {"type": "Sequence", "decoders": [replace("aa")] * 35}
STEP = split("(a+)+$")["pre_tokenizer"]
TWICE = '{"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "pattern": {"String": "b"}}, "model": {}}'
BAD = {
    "deep sequence exponential": document(pre_tokenizer=nested(STEP, "pretokenizers", 12)),
    "deep sequence doubling": document(normalizer=nested(DOUBLING, "normalizers", 12)),
    "decoder replace deep": document(decoder=nested(DECODING, "decoders", 12)),
    "list form replace": document(normalizer=[{"String": "a"}, "a" * 100_000]),
    "list form in sequence": document(
        normalizer={"type": "Sequence", "normalizers": [[{"String": "a"}, "aa"]] * 40}),
    "decoder replace list": document(decoder=[{"String": "a"}, "a" * 1_000_000]),
    "list form of a pre-tokenizer": document(pre_tokenizer=[{"Regex": "(a+)+$"}, "Isolated", False]),
    "list form of a post-processor": document(post_processor=[["x", 1], ["y", 2]]),
    "a sequence of an object": document(normalizer={"type": "Sequence", "normalizers": {"0": DOUBLING}}),
    "no type": document(normalizer={"pattern": {"String": "a"}, "content": "aa"}),
    "another type": document(post_processor=TEMPLATE | {"type": "ByteLevel", "sep": ["x", 1], "cls": ["y", 2],
                                                       "trim_offsets": True, "add_prefix_space": False}),
    "a step of another part": document(decoder={"type": "Split", "pattern": {"Regex": "a"}}),
    "a key twice": TWICE,
    "two patterns": document(normalizer=replace("", {"String": "a", "Regex": "(a+)+$"})),
    "a list as pattern": document(normalizer=replace("", ["(a+)+$"])),
    "prepend huge": document(normalizer={"type": "Prepend", "prepend": "a" * 1_000_000}),
    "prepend some": document(normalizer={"type": "Prepend", "prepend": "a" * 60}),
    "prepend often": document(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "aa"}] * 6}),
    "replace x1000": document(normalizer=replace("b" * 1000)),
    "replace x50": document(normalizer=replace("b" * 50)),
    "replace in a decoder": document(decoder=replace("b" * 50)),
    "replace an expression that may be empty": document(**replacing("aa", 4, {"Regex": "x*"})),
    "replace nothing": document(**replacing("aa", 4, {"String": ""})),
    "decoders that double": document(
        decoder={"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 20}),
    "precompiled growth": document(normalizer=table(b"\0" * 2048, b"b" * 100_000 + b"\0")),
    "precompiled: a trie of 4 GB": document(normalizer=table(b"\xff" * 60, b"", 0xFFFFFFFF)),
    "precompiled: a trie beyond its bytes": document(normalizer=table(b"\0" * 8, b"abc", 4096)),
    "precompiled: no trie": document(normalizer=table(b"", b"abc")),
    "precompiled: half a unit": document(normalizer=table(b"\0" * 6, b"abc")),
    "precompiled: no text": document(normalizer=table(b"\0" * 8, b"\xff\xfe")),
    "precompiled: not base64": document(normalizer={"type": "Precompiled", "precompiled_charsmap": "*"}),
    "precompiled: a list": document(normalizer={"type": "Precompiled", "precompiled_charsmap": [0, 0, 0, 0]}),
    "added normalized growth": document(
        normalizer=replace("b" * 30), added_tokens=[added("a" * 300 + str(i), 7 + i, normalized=True, special=False)
                                                     for i in range(1000)]),
    "regex of brackets": document(**split("[" * 20_001)),
    "regex opt counted nests": document(**split("(" * 9 + "a?" + "){16}" * 9 + "z")),
    "regex empty counted nests": document(**split("(" * 8 + "(?=.)" + "){16}" * 8 + "z")),
    "regex repeat memory": document(**split("a{100000}" * 1000)),
    "regex with blanks": document(**split("(?x)(a+) +$")),
    "regex with a comment": document(**split("(a+)(?#b)+$")),
    "regex of absence": document(**split("(?~ab)(?~ab)(?~ab)c")),
    "regex with a condition": document(**split("(a)?(?(1)b+|c)+d")),
    "regex with a callout": document(**split("(*COUNT[a]{X})a+")),
    "regex with a control character": document(**split(r"\c[(a+)+$")),
    "regex of stacked counts": document(**split("a{1,9}{1,9}{1,9}{1,9}+z")),
    "regex of Fibonacci": document(**split("(aa?)*z")),
    "regex of eight stars": document(**split("(a*){8}z")),
    "decoy regex": document(**split("bcdfghijklmnopqrs|e [^\\0]*[^\\0]*\u2603")),
    "decoy regex for code": document(**split(r"bcdfghijklmnopqrs|\[i\][^\0]*[^\0]*\u2603")),
    "decoy regex in quadratic time": document(**split("e [^\\0]*\u2603")),
    "decoy regex of its own words": document(
        **split("|".join(f"w{i}x" for i in range(40)) + "|zyxw [^\\0]*[^\\0]*\u2603")),
    "many regexes": document(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(f"[a{chr(0x100 + i)}]+" * 100)["pre_tokenizer"] for i in range(50)]}),
    "wordpiece cubic": wordpiece(max_input_chars_per_word=10**9),
    "wordpiece long prefix": wordpiece(continuing_subword_prefix="#" * 1_000_000),
    "wordpiece without its type": {**document(), "model": {
        k: v for k, v in wordpiece(max_input_chars_per_word=200)["model"].items() if k != "type"}},
    "unigram long pieces": unigram("a" * k for k in range(1, 2000)),
    "unigram of what is no piece": unigram([1]),
    "unigram trie": unigram(f"{i:08d}" * 8 for i in range(40_000)),
    "bpe long prefix": document(model={"continuing_subword_prefix": "#" * 1_000_000}),
    "bpe long suffix": document(model={"end_of_word_suffix": "#" * 1_000_000}),
    "bpe long pieces": document(model={"vocab": {"a" * k: k for k in range(1, 1000)}}),
    "bpe merges of an object": document(model={"merges": {"a": "b"}}),
    "long added token": document(added_tokens=[added("z" * 5_000_000, 7)]),
    "many long added tokens": document(added_tokens=[added(f"{i:05d}" * 80, 7 + i) for i in range(4000)]),
    "an added token of a list": document(added_tokens=[["zz", 7]]),
    "template copies": document(post_processor=pieces(*[TEXT] * 60)),
    "template text form": document(post_processor=TEMPLATE | {"single": "a:0 " * 1000 + "$A"}),
    "template list of text": document(post_processor=pieces(*["a:0"] * 1000, "$A")),
    "template special list form": document(post_processor=pieces(TEXT) | {"special_tokens": [{"id": "a", "ids": [0]}]}),
    "template in lists": document(post_processor={"type": "Sequence", "processors": [
        pieces(*[{"SpecialToken": {"id": "a", "type_id": 0}}] * 40, TEXT)] * 2}),
    "fixed length 0": document(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "decoder strip": document(decoder={"type": "Strip", "content": "a", "start": 2**62, "stop": 2**62}),
    "millions of values": '{"x": [' + "[]," * (1 << 22) + "0]}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_whose_work_multiplies_is_refused_before_any_text(name):
    text = BAD[name] if isinstance(BAD[name], str) else json.dumps(BAD[name])
    with bounded_work(SECOND), pytest.raises(TokenizerError) as caught:
        load_tokenizer(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError):
            load_tokenizer(text)
        assert tracemalloc.get_traced_memory()[1] < LITTLE_MEMORY
    finally:
        tracemalloc.stop()


SPACE = "\u2581"
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
TOKENS = [{"SpecialToken": {"id": "a", "type_id": 0}}, TEXT]
GOOD = {
    "Llama": document(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE},
                                                        replace(SPACE, {"String": " "})]},
        decoder={"type": "Sequence", "decoders": [replace(" ", {"String": SPACE}), {"type": "ByteFallback"},
                                                  {"type": "Fuse"}, STRIP]},
        post_processor=pieces(*TOKENS)),
    "Gemma": document(
        normalizer=replace(SPACE, {"String": " "}),
        pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        model={"vocab": {"a": 0, "b": 1, **{SPACE * k: k for k in range(2, 32)}}, "byte_fallback": True},
        added_tokens=[added(f"<unused{i}>", 40 + i) for i in range(6000)]),
    "Llama 3": document(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            split(r"(?i:'s|'t)|\p{N}{1,3}|\s+(?!\S)")["pre_tokenizer"],
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        post_processor={"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            pieces(*TOKENS)]},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model={"vocab": {"a": 0, "b": 1, "\u0120" * 128: 2}},
        added_tokens=[added(f"<|reserved_special_token_{i}|>", 7 + i) for i in range(256)]),
    "CLIP": document(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, replace(" ", {"Regex": r"\s+"}),
                                                        {"type": "Lowercase"}]},
        post_processor={"type": "RobertaProcessing", "sep": ["b", 1], "cls": ["a", 0], "trim_offsets": False,
                        "add_prefix_space": False},
        model={"end_of_word_suffix": "</w>", "unk_token": "a", "vocab": {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3}}),
    "BERT": wordpiece() | {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["?", 0]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    "T5": unigram(["a", "b", SPACE]) | {
        "normalizer": {"type": "Sequence", "normalizers": [
            table(b"\0" * 2048, b"b\0" + "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647 \u0639\u0644\u064a".encode()),
            replace(" ", {"Regex": " {2,}"})]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
        "added_tokens": [added(f"<extra_id_{i}>", 4 + i) for i in range(100)]},
    "CodeGen": document(added_tokens=[added(" " * k, 7 + k, normalized=True, special=False) for k in range(2, 32)]),
    "32,768 visual tokens": document(added_tokens=[added(f"<|visual token {i:06d}|>", 7 + i) for i in range(32_768)]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_tokenizers_made_like_published_ones_are_read(name):
    tokenizer = load_tokenizer(json.dumps(GOOD[name]))
    ids = encoded(tokenizer, "ab", special=True)
    assert ids
    decoded(tokenizer, ids)
    with bounded_work():
        ChatTemplate(None, tokenizer).encode([{"role": "user", "content": "<a <|visual token 000001|> b" * 100}])


@pytest.mark.parametrize("pattern", ["[" * 20_000, "(" * 20_000, "{1" * 9999, "[^]" * 6000, "(" * 9999 + ")" * 9999])
def test_the_form_of_an_expression_is_read_in_linear_time(pattern):
    with bounded_work(SECOND):
        wrong_form(pattern)


@pytest.mark.parametrize("pattern", [r"(?:a|b){3}", r"[^]a[b]]+", r"a{1,3}?b++", r"x{}y{,2}", r"(?<y>a)(?i)b(?>c)",
                                     r"\p{L}{2,}[\]a]*", r"(?<!\d)\x{41}+"])  # fmt: skip
def test_expressions_of_no_harm_are_read(pattern):
    assert wrong_patterns([pattern]) == ("", "")


def test_markers_are_those_of_a_regular_expression():
    draw = random.Random(1)
    for _ in range(500):
        texts = {"".join(draw.choices("ab<^]-", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 5))}
        text = "".join(draw.choices("ab<^]-" + GUARD, k=20))
        any_of = "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
        assert Markers(texts, GUARD).split(text) == re.split(f"({any_of})(?!{GUARD})", text)


@pytest.mark.parametrize("end", ["", "c"])
def test_markers_that_begin_alike_take_little_time(end):
    markers = Markers([("a" * length) + end for length in range(200, 512)], GUARD)
    with bounded_work(SECOND):
        markers.split(("a" * 190 + "b") * 100)
