"""Corpus, tokenizer and evaluation windows: every document, every byte and every token once."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from kvq.models.corpus import END_OF_TEXT, documents, pack
from kvq.models.evaluate import strided_windows
from tests.tools.checkpoints import small_tokenizer


def test_packing_keeps_every_document(tmp_path):
    texts = ["First document, with ünïcode.", "Second one.\n\nTwo paragraphs."]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"\n{END_OF_TEXT}\n".join(texts) + f"\n{END_OF_TEXT}\n\n", encoding="utf-8")
    assert list(documents(corpus)) == texts
    tokenizer = small_tokenizer()
    count = pack(documents(corpus), tokenizer, tmp_path / "ids")
    packed = np.fromfile(tmp_path / "ids", np.uint16)
    assert len(packed) == count
    assert tokenizer.decode(packed.tolist(), skip_special_tokens=False) == "".join(t + END_OF_TEXT for t in texts)


def test_tokenizer_round_trips_any_text():
    tokenizer = small_tokenizer()
    text = "Zażółć 12345 漢字 🦙\t\r\n \x00\x7f"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.token_to_id(END_OF_TEXT) == 0


@pytest.mark.parametrize(("count", "context", "stride"), [(1, 8, 4), (7, 8, 4), (8, 8, 4), (100, 8, 4), (101, 16, 5)])
def test_strided_windows_score_every_token_once(count, context, stride):
    scored = []
    for start, stop, first in strided_windows(count, context, stride):
        assert stop - start <= context
        assert first - start >= min(first, context - stride)
        scored += range(first, stop)
    assert scored == list(range(1, count))
