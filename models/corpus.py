"""Text corpus -> byte-level BPE tokenizer -> one packed file of token ids.

A corpus is a UTF-8 text file whose documents are separated by lines holding only
``<|endoftext|>``. The packed file is raw little-endian uint16, documents joined by the
end-of-text id, so training can memory-map it and cut windows anywhere.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvq.runtime.files import atomic_file

END_OF_TEXT = "<|endoftext|>"
# The chat markers of SmolLM-Instruct; reserved so that a fine-tune need not resize the vocabulary.
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]


def documents(path: str | os.PathLike) -> Iterator[str]:
    """Yield the documents of a corpus file (plain or .xz), stripped, empty ones dropped."""
    opener = lzma.open if str(path).endswith(".xz") else open
    lines: list[str] = []
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip() == END_OF_TEXT:
                if document := "".join(lines).strip():
                    yield document
                lines = []
            else:
                lines.append(line)
    if document := "".join(lines).strip():
        yield document


def train_tokenizer(texts: Iterator[str], vocab_size: int = 8192) -> Tokenizer:
    """Train a byte-level BPE tokenizer built like SmolLM's: digits apart, no added prefix space.

    Every byte is in the initial alphabet, so any input text round-trips exactly.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(texts: Iterator[str], tokenizer: Tokenizer, out: Path) -> int:
    """Write all documents as uint16 ids to `out`, each closed by end-of-text; return the count.

    A killed run never leaves half a corpus behind.
    """
    if tokenizer.get_vocab_size() > 1 << 16:
        raise ValueError(
            f"packed corpora hold uint16 ids, the vocabulary has {tokenizer.get_vocab_size()} entries;"
            " train a tokenizer of at most 65536"
        )
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], np.uint16)
    count = 0
    with atomic_file(out) as file:
        for encoding in _encode(texts, tokenizer):
            ids = np.asarray(encoding, np.uint16)
            file.write(ids.tobytes())
            file.write(end.tobytes())
            count += len(ids) + 1
    return count


def _encode(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Encode in batches of documents: the tokenizer works on all cores inside a batch."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 32:
            yield from (e.ids for e in tokenizer.encode_batch(batch, add_special_tokens=False))
            batch = []
    if batch:
        yield from (e.ids for e in tokenizer.encode_batch(batch, add_special_tokens=False))
