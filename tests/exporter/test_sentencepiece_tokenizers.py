"""Tokenizers of tokenizer.model, as a file and in GGUF: ids equal to those of sentencepiece and transformers."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvq.exporter.calibration import calibration_text
from kvq.exporter.sources import pieces
from kvq.exporter.sources.tokenizers import from_gguf, from_sentencepiece
from kvq.runtime.errors import CheckpointError, KvqError, UnsupportedArchitectureError
from tests.tools.packages import needs
from tests.tools.tokenizer_texts import CONTROL, MANY, TEXT, USER, assert_same, one_line


def train(**options: object) -> bytes:
    """A BPE tokenizer.model such as Llama's, trained on the calibration text."""
    sentencepiece = needs("sentencepiece")
    written = io.BytesIO()
    like_llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(calibration_text().splitlines()),
        model_writer=written,
        minloglevel=2,
        **{"vocab_size": 600, "model_type": "bpe", "control_symbols": CONTROL, "user_defined_symbols": USER}
        | like_llama
        | options,
    )
    return written.getvalue()


def sentencepiece_fields(processor) -> dict[str, object]:
    """What llama.cpp's converter writes for a tokenizer.model."""
    count = range(processor.get_piece_size())
    tests = {2: processor.is_unknown, 3: processor.is_control, 5: processor.is_unused, 6: processor.is_byte}
    types = [next((type_ for type_, test in tests.items() if test(i)), 1) for i in count]
    texts = [processor.id_to_piece(i) for i in count]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [processor.get_score(i) for i in count],
        "tokenizer.ggml.token_type": [4 if text in USER else type_ for text, type_ in zip(texts, types, strict=True)],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def processor(model):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def ours(model) -> Tokenizer:
    return Tokenizer.from_str(from_sentencepiece(model, "tokenizer.model"))


@pytest.fixture(scope="module")
def in_gguf(processor) -> Tokenizer:
    return Tokenizer.from_str(from_gguf(sentencepiece_fields(processor), "a.gguf"))


@pytest.fixture(scope="module")
def transformers_tokenizer(model, tmp_path_factory) -> Tokenizer:
    """LlamaTokenizerFast in its legacy form: the other one adds no space before text that begins with one."""
    transformers = needs("transformers")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model)
    return transformers.LlamaTokenizerFast.from_pretrained(folder, legacy=True).backend_tokenizer


def without_special(text: str) -> str:
    """Without what sentencepiece reads as plain text and Hugging Face tokenizers as special tokens, or splits at."""
    special = ("<s>", "</s>", "<unk>", *CONTROL, *USER)
    while found := [token for token in special if token in text]:
        text = text.replace(found[0], "")
    return text


@MANY
@given(text=TEXT)
def test_sentencepiece_ids_are_those_of_transformers(ours, transformers_tokenizer, text):
    assert_same(text, ours, transformers_tokenizer)


@MANY
@given(text=TEXT.map(without_special))
def test_sentencepiece_ids_are_those_of_sentencepiece(ours, processor, text):
    ids = ours.encode(text).ids
    assert ids == [processor.bos_id(), *processor.encode(text)]
    assert ours.decode(ids) == processor.decode(ids) == text.replace("▁", " ")


@MANY
@given(text=TEXT)
def test_sentencepiece_in_a_gguf_file(ours, in_gguf, text):
    assert_same(text, in_gguf, ours)


@settings(max_examples=200, deadline=None)
@given(
    scored=st.dictionaries(st.text("ab", min_size=1, max_size=6), st.sampled_from([-2.0, -1.0, 0.0]), min_size=1),
)
def test_merges_are_those_of_transformers(scored):
    """Equal scores too, which a trained model does not have."""
    convert = needs("transformers.convert_slow_tokenizer")
    vocab = {text: index for index, text in enumerate(scored)}
    ours = pieces.Pieces(list(scored), list(scored.values()), [pieces.NORMAL] * len(scored), 0, None, None)
    assert ours.merges("m") == convert.generate_merges(vocab, scored.items())


@pytest.mark.parametrize(
    "options", [{"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}, {"byte_fallback": False}]
)
def test_sentencepiece_options(options):
    import sentencepiece

    data = train(**options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = Tokenizer.from_str(from_sentencepiece(data, "tokenizer.model", add_bos=False))

    @settings(max_examples=100, deadline=None)
    @given(text=TEXT.map(without_special))
    def check(text):
        assert tokenizer.encode(text).ids == processor.encode(text)

    check()


def test_sentencepiece_bos_and_eos(model, processor):
    plain, bos, eos = processor.encode("sea"), processor.bos_id(), processor.eos_id()
    for add_bos, add_eos in ((True, False), (False, True), (True, True), (False, False)):
        tokenizer = Tokenizer.from_str(from_sentencepiece(model, "m", add_bos=add_bos, add_eos=add_eos))
        assert tokenizer.encode("sea").ids == [bos] * add_bos + plain + [eos] * add_eos
    fields = sentencepiece_fields(processor)
    assert Tokenizer.from_str(from_gguf(fields, "m")).encode("sea").ids == [bos, *plain]
    fields |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    no_prefix = Tokenizer.from_str(from_gguf(fields, "m"))
    assert no_prefix.encode(" sea").ids == plain
    assert no_prefix.decode(plain) == " sea"
    headless = train(bos_id=-1)
    with pytest.raises(CheckpointError, match=r"no BOS token to add; pass add_bos=False"):
        from_sentencepiece(headless, "m")
    from_sentencepiece(headless, "m", add_bos=False)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram"}, "of the kind unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "precompiled_charsmap"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"escape_whitespaces": False}, "escape_whitespaces"),
    ],
)
def test_sentencepiece_models_that_are_refused(options, why):
    # The trainer has no option for spaces that are not escaped: the field is added behind.
    data = train() + b"\x1a\x02\x28\x00" if "escape_whitespaces" in options else train(**options)
    with pytest.raises(UnsupportedArchitectureError, match=why):
        from_sentencepiece(data, "tokenizer.model")


def piece(text: bytes, type_: int = 1, score: float = 0.0) -> bytes:
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([type_])
    return b"\x0a" + bytes([len(body)]) + body


BPE = b"\x12\x02\x18\x02"
SMALL = piece(b"<unk>", 2) + piece(b"<s>", 3) + piece(b"a")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no tokens"),
        (b"<html>", "wire type 4"),
        (BPE, "no tokens"),
        (SMALL[:-1] + BPE, "cut short|wire type|another type"),
        (SMALL + b"\x0a\xff\xff\xff\xff\x0f", "cut short"),
        (SMALL + b"\x0a" + b"\xff" * 11, "more than 64 bits"),
        (SMALL + b"\x0a", "cut short"),
        (SMALL + b"\x08\x01", "a number where a message should be"),
        (SMALL + b"\x0a\x02\x08\x01", "field 1 has another type"),
        (SMALL + b"\x0a\x05\x12\x03abc", "field 2 has another type"),
        (SMALL + piece(b"\xff"), "not UTF-8"),
        (SMALL + piece(b"a"), "token 3 has the text 'a' of token 2"),
        (SMALL + piece(b""), "token 3 has no text"),
        (SMALL + piece(b"b", 7), "token 3 has the type 7"),
        (SMALL + piece(b"b", 1, float("nan")), "token 3 has the score nan"),
        (piece(b"a") + BPE, "0 tokens of the type unknown"),
        (SMALL + piece(b"<u>", 2) + BPE, "2 tokens of the type unknown"),
        (SMALL, "of the kind unigram"),
    ],
)
def test_damaged_sentencepiece_models(data, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        from_sentencepiece(data, "tokenizer.model")
    one_line(caught.value)


def test_small_sentencepiece_model():
    tokenizer = Tokenizer.from_str(from_sentencepiece(SMALL + BPE, "m"))
    assert tokenizer.encode("ab").ids == [1, 0, 2, 0]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_sentencepiece_models_raise_nothing_else(data):
    whole = bytearray(SMALL + piece(b"b") + piece(b"ab", 1, -1.0) + piece(b"<0x00>", 6) + BPE + b"\x1a\x02\x20\x00")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        Tokenizer.from_str(from_sentencepiece(bytes(whole), "m", add_bos=data.draw(st.booleans()))).encode("ab <s> c")
    except KvqError as error:
        one_line(error)
