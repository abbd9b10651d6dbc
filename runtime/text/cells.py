"""Text to be shown token by token: cells of whole characters, and characters that can do no harm."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from kvq.runtime.text.decoder import StreamingDecoder

ZERO_WIDTH_JOINER = "\u200d"
# Format characters that only shape their neighbours: the joiners, which emoji and several scripts need.
SHAPING = {ZERO_WIDTH_JOINER, "\u200c"}
MARKS = {"Mn", "Mc", "Me"}
# What changes or hides text instead of being seen: controls, format characters (bidi overrides, tags), line and
# paragraph separators, lone surrogates.
HARMFUL = {"Cc", "Cf", "Zl", "Zp", "Cs"}


class Cell(NamedTuple):
    """The smallest run of tokens that is whole characters: nearly always a single token.

    first, length: its tokens: the place of the first, and how many.
    text: what they say together.
    """

    first: int
    length: int
    text: str


def cells(tokenizer: Tokenizer | None, ids: Sequence[int], behind: Sequence[int] = ()) -> list[Cell]:
    """Cut a text into cells; together they are all tokens and the whole decoded text, special tokens included.

    Tokens that hold parts of one character share a cell, a letter and its accents and the parts of
    one emoji too. Without a tokenizer a cell is a token, and its text the id: "<17>".

    behind: ids that these stand behind, where a cell ended; none at the beginning of a text.
    """
    if tokenizer is None:
        return [Cell(i, 1, f"<{token}>") for i, token in enumerate(ids)]
    decoder = StreamingDecoder(tokenizer, skip_special_tokens=False)
    if len(behind):
        decoder.follow(behind)
    found: list[Cell] = []
    first, text = 0, ""
    for i, token in enumerate(ids):
        text += decoder.push(token)
        if decoder.whole and text:
            if found and _joined(found[-1].text, text):
                last = found.pop()
                first, text = last.first, last.text + text
            found.append(Cell(first, i + 1 - first, text))
            first, text = i + 1, ""
    if first < len(ids):  # the text ends within a character, or in tokens that say nothing
        text += decoder.flush()
        if found and not text:
            last = found.pop()
            first, text = last.first, last.text
        found.append(Cell(first, len(ids) - first, text))
    return found


def _joined(before: str, after: str) -> bool:
    """Whether what follows belongs to the last character before it, as a reader sees characters."""
    last, following = before[-1], after[0]
    if last.isspace():
        return False
    if unicodedata.category(following) in MARKS or following in SHAPING or last == ZERO_WIDTH_JOINER:
        return True
    if "\U0001f3fb" <= following <= "\U0001f3ff":  # a skin tone
        return True
    # Flags are pairs of regional indicators.
    flags = len(before) - len(before.rstrip(_REGIONAL))
    return flags % 2 == 1 and following in _REGIONAL


_REGIONAL = "".join(map(chr, range(0x1F1E6, 0x1F200)))


def graphemes(text: str) -> Iterator[str]:
    """Characters as a reader sees them: a base with its marks, an emoji with its parts."""
    cluster = ""
    for character in text:
        if cluster and not _joined(cluster, character):
            yield cluster
            cluster = ""
        cluster += character
    if cluster:
        yield cluster


def columns(grapheme: str) -> int:
    """Most columns that a terminal gives one grapheme; many draw the parts of an emoji one by one."""
    return sum(
        0 if unicodedata.category(c) in {"Mn", "Me", "Cf"} else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in grapheme
    )


def visible(text: str) -> str:
    """The text with every harmful character replaced by something to see; newline and tab stay.

    Control characters become their pictures (U+2400 and following), the others "<U+202E>". What
    comes out moves no cursor, reorders no line and starts no escape sequence.
    """
    return "".join(map(_visible, text))


def escaped(text: str) -> str:
    """A JSON text whose harmful characters are JSON's escapes: it says the same, and no terminal does what they ask."""
    return "".join(json.dumps(each)[1:-1] if _is_harmful(each) else each for each in text)


def _is_harmful(character: str) -> bool:
    return character not in "\n\t" and character not in SHAPING and unicodedata.category(character) in HARMFUL


def _visible(character: str) -> str:
    if not _is_harmful(character):
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"
