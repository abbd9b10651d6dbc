"""The SmolLM tokenizer: published ids, exact round trips, streaming."""

import json

import pytest
from tokenizers import Tokenizer

from kvq.runtime.text.decoder import StreamingDecoder
from tests.tools.shared_data import shared_file

TEXTS = [
    "Hello, world!",
    "  leading and   inner spaces\tand tabs\n\nand lines",
    "Digits 1234567890 are split; so is 3.14159.",
    "Ünïcödé, 漢字, العربية, emoji 🦙👩‍👩‍👧 and math ∑∫√",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(shared_file("tokenizer", "tokenizer.json")))


def test_ids_are_the_published_ones(tokenizer):
    prompts = json.loads(shared_file("tokenizer", "golden_ids.json").read_text())["prompts"]
    assert prompts
    for prompt in prompts:
        assert tokenizer.encode(prompt["text"]).ids == prompt["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_streaming(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    decoder = StreamingDecoder(tokenizer, skip_special_tokens=False)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
