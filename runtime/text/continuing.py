"""Encoding and decoding what follows another text: sentencepiece-like tokenizers treat a text's beginning otherwise.

They put a space before a text and take it away again when they decode. What is encoded or decoded alone, but stands
behind something, must see what it stands behind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from kvq.runtime.text.tokenizer import decoded, encoded, guarded

# What stands before a text in place of what does: one of them does not merge with its beginning.
ANCHORS = ("\n", "a", ".", "0", "é")
# Tokens before a text that its decoder has to know.
CONTEXT = 24


def adds_space(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a space before a text that has none."""
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer):
        if part is not None and _adds(json.loads(part.__getstate__())):
            return True
    return False


def _adds(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    inner = [each for name in ("normalizers", "pretokenizers") for each in part.get(name) or []]
    if part.get("type") == "Metaspace":
        return part.get("prepend_scheme", "always") != "never"
    return (
        part.get("type") == "Prepend"
        or (part.get("type") == "ByteLevel" and part.get("add_prefix_space") is True)
        or any(map(_adds, inner))
    )


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text of every added token -> its id, those that are blanks left out."""
    found = guarded(tokenizer.get_added_tokens_decoder, "to list its added tokens")
    return {token.content: index for index, token in found.items() if token.content.strip()}


def encoded_behind(tokenizer: Tokenizer, text: str, before: str | None, most: int | None = None) -> list[int]:
    """Token ids of a text that stands behind another one.

    Args:
        tokenizer: encodes it.
        text: of any length.
        before: the added token that it stands behind; None for any other text.
        most: as in `encoded`.

    Raises:
        ContextError, TokenizerError: as in `encoded`.
    """
    if not text or not adds_space(tokenizer):
        return encoded(tokenizer, text, most=most)
    for anchor in ANCHORS if before is None else (before,):
        alone = encoded(tokenizer, anchor)
        whole = guarded(lambda anchor=anchor: tokenizer.encode(anchor + text, add_special_tokens=False), "to encode")  # type: ignore[misc]
        if whole.ids[: len(alone)] == alone and all(start >= len(anchor) for start, _ in whole.offsets[len(alone) :]):
            return whole.ids[len(alone) :]
    return encoded(tokenizer, text, most=most)


def decoded_behind(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of token ids that stand behind others, special tokens included.

    Raises:
        TokenizerError: the tokenizer fails.
    """
    context = [*before[-CONTEXT:]]
    start = decoded(tokenizer, context, skip_special_tokens=False)
    whole = decoded(tokenizer, [*context, *ids], skip_special_tokens=False)
    if whole.startswith(start):
        return whole[len(start) :]
    return decoded(tokenizer, ids, skip_special_tokens=False)  # where ids complete a character of the context
