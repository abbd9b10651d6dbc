"""Single tokens as the API shows them beside log-probabilities: text, bytes, alternatives."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from kvq.runtime.session.sampling import Scored


class TokenTexts:
    """What single token ids stand for.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = set(added)
        self._skipped = {id for id, token in added.items() if token.special}
        byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._bytes_of = _byte_alphabet() if byte_level else None

    def nbytes(self, token: int) -> bytes:
        """The bytes of a token; a character may span several tokens."""
        piece = self._tokenizer.id_to_token(token) or ""
        if token in self._special:
            return piece.encode()
        if self._bytes_of is not None:
            return b"".join(self._bytes_of.get(c, c.encode()) for c in piece)
        if code := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):  # byte fallback
            return bytes.fromhex(code[1])
        return piece.replace("▁", " ").encode()

    def shown_nbytes(self, token: int) -> int:
        """How many bytes of text a token adds to a response."""
        return 0 if token in self._skipped else len(self.nbytes(token))

    def all(self, tokens: Sequence[int]) -> str:
        """The text of tokens in a row, special ones included."""
        return b"".join(map(self.nbytes, tokens)).decode(errors="replace")

    def name(self, token: int) -> str:
        """The text of a token; of a part of a character its bytes, as OpenAI's completions spell them."""
        raw = self.nbytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def text(self, token: int) -> str:
        """The text of a token; U+FFFD where it is a part of a character."""
        return self.nbytes(token).decode(errors="replace")


class Offsets:
    """Where tokens begin in the text that they make, in characters; within a character, where that one begins."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, raw: bytes) -> int:
        """Where the next token begins, of these bytes."""
        begun = self._characters
        self._characters += len(self._decoder.decode(raw))
        return begun


def _byte_alphabet() -> dict[str, bytes]:
    """The characters that byte-level BPE writes for bytes (GPT-2): printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(moved)}


def chat_logprobs(texts: TokenTexts, chosen: list[Scored], alternatives: list[list[Scored]]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""

    def entry(scored: Scored) -> dict[str, Any]:
        raw = texts.nbytes(scored.token)
        return {"token": texts.text(scored.token), "logprob": scored.logprob, "bytes": list(raw)}

    rows = zip(chosen, alternatives, strict=True)
    return {"content": [entry(one) | {"top_logprobs": [entry(other) for other in top]} for one, top in rows]}


def completion_logprobs(
    texts: TokenTexts,
    chosen: list[Scored],
    alternatives: list[list[Scored]],
    offsets: Offsets,
    first: int | None = None,
) -> dict[str, Any]:
    """The `logprobs` object of a completion choice.

    Args:
        texts: of tokens.
        chosen, alternatives: tokens, and the most likely ones in the place of each.
        offsets: of the choice, told of the tokens before these.
        first: an id before them that stands behind nothing, so that it has no log-probability; None for none.
    """
    ahead: list[Any] = [] if first is None else [None]
    tokens = [*([] if first is None else [first]), *(one.token for one in chosen)]
    return {
        "tokens": [texts.name(token) for token in tokens],
        "token_logprobs": ahead + [one.logprob for one in chosen],
        "top_logprobs": ahead + [{texts.name(other.token): other.logprob for other in top} for top in alternatives],
        "text_offset": [offsets.next(texts.nbytes(token)) for token in tokens],
    }
