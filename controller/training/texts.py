"""Windows of token ids from a text file, without encoding more of it than they need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvq.runtime.errors import CalibrationError
from kvq.runtime.files import read_bounded

Encode = Callable[[str], list[int]]
# Characters taken per token asked for, at first. Where a text has more of them per token, the slice grows.
SLICE = 8
# Up to where a sentence or a line ends, with the blanks behind it; text without either is cut between words.
PIECE = re.compile(r".{1,400}?(?:[.!?]+[\"')\]]*\s+|\n\s*|$)|.{1,400}(?:\s+|$)|.{1,400}", re.S)
MOST_TEXT = 1 << 31  # bytes of a text
COUNTED = 1 << 20  # characters after which a count of tokens is an estimate


def read_text(file: Path, option: str) -> str:
    """The text of a UTF-8 file.

    Args:
        file: the path.
        option: the command's option that named it, for the message.

    Raises:
        CalibrationError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = read_bounded(file, MOST_TEXT).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise CalibrationError(f"cannot read {file}: {error.strerror}; check the path given with {option}") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"{file} is not UTF-8; convert it, e.g. with iconv -t UTF-8") from None
    if not text.strip():
        raise CalibrationError(f"{file} has no text in it; give another with {option}")
    return text


def sentences(text: str) -> list[str]:
    """A text cut into sentences and lines, with the blanks behind each: together they are the text."""
    return PIECE.findall(text)


def count_tokens(encode: Encode, text: str) -> int:
    """Tokens of a text, estimated from its beginning where it is long."""
    head = text[:COUNTED]
    return len(encode(head)) * len(text) // max(1, len(head))


def windows(encode: Encode, text: str, lengths: list[int], name: str) -> list[np.ndarray]:
    """Windows of the given numbers of tokens, evenly spread over a text; int64 [length] each.

    Each is encoded by itself, so it begins as a session does: with the tokenizer's own special
    tokens, if it has any. A window begins after a space where there is one near.

    Args:
        encode: text -> token ids.
        text: where they are cut from; windows overlap where it is short.
        lengths: tokens of each window.
        name: what the text is called in the message.

    Raises:
        CalibrationError: the text has fewer tokens than a window.
    """
    found = []
    for number, length in enumerate(lengths):
        size = SLICE * length
        while True:
            start = round(number / max(1, len(lengths) - 1) * max(0, len(text) - size))
            if start:
                space = text.find(" ", start, start + size // 4)
                start = max(start, space)
            ids = encode(text[start : start + size])
            if len(ids) >= length or size >= len(text):
                break
            size *= 2
        if len(ids) < length:
            raise CalibrationError(f"{name} has {len(ids)} tokens, a window needs {length}; give a longer text")
        found.append(np.asarray(ids[:length], np.int64))
    return found
