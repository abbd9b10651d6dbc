"""Pieces of a sentencepiece-like vocabulary, and the reader of sentencepiece's own file, tokenizer.model.

The file is one protobuf message (sentencepiece_model.proto), read here by hand: nothing of it is needed but the pieces
and a few settings, and neither protobuf nor sentencepiece has to be installed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvq.exporter import limits
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from kvq.runtime.text.tokenizer import LONGEST_SPELLED, MOST_CHARACTERS, MOST_MERGES, MOST_PIECES

# Types of pieces; sentencepiece and GGUF number them alike (GGUF also has 0, undefined).
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)
UNIGRAM, BPE = 1, 2
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "character"}


@dataclass(frozen=True)
class Pieces:
    """A sentencepiece-like vocabulary; the three lists are of one length.

    Attributes:
        texts: by id, all different, none empty.
        scores: the better, the earlier two pieces are merged into this one; finite.
        types: one of the constants above.
        unk: id for what nothing else stands for.
        bos, eos: ids that begin and end a text; None if there are none.
        add_prefix: a space is put before text.
        squeeze: spaces at both ends are dropped, several in a row made one.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unk: int
    bos: int | None
    eos: int | None
    add_prefix: bool = True
    squeeze: bool = False

    def merges(self, name: str) -> list[tuple[str, str]]:
        """What two pieces are merged, the first first: every cut of a piece into two others, by its score.

        Among equal scores the order is that of transformers' generate_merges: the longer left half first. Text cannot
        spell control and byte pieces.

        Raises:
            CheckpointError: too many, or a piece too long to be cut in all places.
        """
        spelled = {text for text, type_ in zip(self.texts, self.types, strict=True) if type_ not in NEVER_SPELLED}
        found: list[tuple[float, int, int, str, str]] = []
        characters = 0
        for text, score in zip(self.texts, self.scores, strict=True):
            if text not in spelled:
                continue
            if len(text) > LONGEST_SPELLED:
                raise damaged(name, f"a token of {len(text)} characters, text has at most {LONGEST_SPELLED}")
            before = len(found)
            for cut in range(1, len(text)):
                left = text[:cut]
                if left in spelled and text[cut:] in spelled:
                    found.append((-score, -cut, cut - len(text), left, text[cut:]))
            characters += (len(found) - before) * len(text)
            check_merges(len(found), characters, name)
        found.sort(key=lambda merge: merge[:3])
        return [merge[3:] for merge in found]


NEVER_SPELLED = (UNKNOWN, CONTROL, BYTE)


def read_model(data: bytes, name: str) -> Pieces:
    """Read a tokenizer.model.

    Args:
        data: content of the file.
        name: of the file, for messages.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedArchitectureError: a kind of model other than BPE, or one that rewrites text in other ways than
            adding a space before it and dropping spaces.
    """
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {3: UNIGRAM, 24: 0, 45: b"<unk>", 46: b"<s>", 47: b"</s>"}
    normalizer: dict[int, Any] = {2: b"", 3: 1, 4: 1, 5: 1}
    denormalizer: dict[int, Any] = {2: b""}
    settings, messages = {2: trainer, 3: normalizer, 5: denormalizer}, 0
    for number, value in _fields(data, name):
        if number == 1:
            piece: dict[int, Any] = {1: b"", 2: b"\0\0\0\0", 3: NORMAL}
            piece |= _known(_fields(_nested(value, name), name, limits.PIECE_FIELDS), _PIECE, name)
            texts.append(_text(piece[1], name))
            scores.append(struct.unpack("<f", piece[2])[0])
            types.append(piece[3])
        elif number in settings:
            within = _fields(_nested(value, name), name, limits.SETTING_FIELDS)
            settings[number] |= _known(within, _SETTINGS[number], name)
        messages += number != 1
        if messages > limits.SETTINGS:
            raise damaged(name, f"more than {limits.SETTINGS} messages of settings")
        if len(texts) > MOST_PIECES:
            raise damaged(name, f"more than {MOST_PIECES} pieces")
    check_pieces(texts, scores, types, name)
    if trainer[3] != BPE:
        kind = MODEL_TYPES.get(trainer[3], trainer[3])
        raise UnsupportedArchitectureError(
            f"{name} is a sentencepiece model of the kind {kind}; kvq converts BPE only, give the tokenizer.json"
        )
    for what, bad in (
        ("a normalizer of its own (precompiled_charsmap)", normalizer[2] or denormalizer[2]),
        ("spaces at the end of words (treat_whitespace_as_suffix)", trainer[24]),
        ("spaces that are not escaped (escape_whitespaces)", not normalizer[5]),
    ):
        if bad:
            raise UnsupportedArchitectureError(
                f"{name} has {what}, which kvq does not convert; give the tokenizer.json"
            )
    ids = {text: index for index, text in enumerate(texts)}
    bos, eos = (ids.get(_text(trainer[key], name)) for key in (46, 47))
    return Pieces(
        texts, scores, types, unknown_id(types, name),
        bos if bos is not None and types[bos] == CONTROL else None,
        eos if eos is not None and types[eos] == CONTROL else None,
        bool(normalizer[3]), bool(normalizer[4]),
    )  # fmt: skip


def check_pieces(texts: Sequence[str], scores: Sequence[float], types: Sequence[int], name: str) -> None:
    """Check a vocabulary from a file; the three are of one length.

    Raises:
        CheckpointError: it is empty, too large, has a text twice or an empty one, a score that is no finite number,
            or a type that there is not.
    """
    check_texts(texts, name)
    check_types(types, name)
    for index, score in enumerate(scores):
        if isinstance(score, int) and abs(score) > 1 << 64:  # more than a float holds, perhaps
            raise damaged(name, f"token {index} has a score out of range")
        if not math.isfinite(score):
            raise damaged(name, f"token {index} has the score {score}")


def check_types(types: Sequence[int], name: str) -> None:
    """Check types of tokens by id.

    Raises:
        CheckpointError: one that there is not.
    """
    for index, type_ in enumerate(types):
        if not UNDEFINED <= type_ <= BYTE:
            shown = type_ if abs(type_) < 1 << 64 else "out of range"
            raise damaged(name, f"token {index} has the type {shown}")


def check_texts(texts: Sequence[str], name: str) -> None:
    """Check texts of tokens by id.

    Raises:
        CheckpointError: none or too many, one that is there twice or is empty, or is no Unicode.
    """
    if not texts:
        raise damaged(name, "no tokens")
    if len(texts) > MOST_PIECES or sum(map(len, texts)) > MOST_CHARACTERS:
        raise damaged(name, f"more than {MOST_PIECES} tokens, or more than {MOST_CHARACTERS} characters in them")
    seen: dict[str, int] = {}
    for index, text in enumerate(texts):
        if not text or seen.setdefault(text, index) != index:
            what = f"the text {text[:40]!r} of token {seen[text]}" if text else "no text"
            raise damaged(name, f"token {index} has {what}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise damaged(name, "a token that is not Unicode text") from None


def check_merges(count: int, characters: int, name: str) -> None:
    """Check how many merges there are, and how many characters in them.

    Raises:
        CheckpointError: too many.
    """
    if count > MOST_MERGES or characters > 2 * MOST_CHARACTERS:
        raise damaged(name, f"more than {MOST_MERGES} merges, or more than {2 * MOST_CHARACTERS} characters in them")


def unknown_id(types: Sequence[int], name: str) -> int:
    """Id of the one piece of type unknown.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = [index for index, type_ in enumerate(types) if type_ == UNKNOWN]
    if len(found) != 1:
        raise damaged(name, f"{len(found)} tokens of the type unknown instead of 1")
    return found[0]


def damaged(name: str, what: str) -> CheckpointError:
    """The error for a tokenizer that cannot be right."""
    return CheckpointError(f"the tokenizer of {name} is damaged: {what}; download it again")


# Field number -> wire type of what is read. Wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
_PIECE = {1: 2, 2: 5, 3: 0}
_SETTINGS = {2: {3: 0, 24: 0, 45: 2, 46: 2, 47: 2}, 3: {2: 2, 3: 0, 4: 0, 5: 0}, 5: {2: 2}}
_WIDTHS = {1: 8, 5: 4}


def _fields(data: bytes, name: str, most: int | None = None) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message one by one: number, and value: varints as int, all else as bytes.

    Raises:
        CheckpointError: damaged, or more than `most` of them.
    """
    at = count = 0
    while at < len(data):
        count += 1
        if most is not None and count > most:
            raise damaged(name, f"a message of more than {most} fields")
        key, at = _varint(data, at, name)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, name)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at, name)
        elif wire in _WIDTHS:
            length = _WIDTHS[wire]
        else:
            raise damaged(name, f"a field of wire type {wire}")
        if length > len(data) - at:
            raise damaged(name, "it is cut short")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    """A number of at most 64 bits, and where the next byte is."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise damaged(name, "it is cut short")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise damaged(name, "a number of more than 64 bits")


def _known(fields: Iterator[tuple[int, int | bytes]], wires: dict[int, int], name: str) -> dict[int, Any]:
    """Those fields of a message that are read; of several with one number the last, as protobuf has it."""
    found: dict[int, Any] = {}
    for number, value in fields:
        wire = wires.get(number)
        if wire is None:
            continue
        if isinstance(value, int) != (wire == 0) or (wire == 5 and isinstance(value, bytes) and len(value) != 4):
            raise damaged(name, f"field {number} has another type than it should")
        found[number] = value
    return found


def _nested(value: int | bytes, name: str) -> bytes:
    if isinstance(value, int):
        raise damaged(name, "a number where a message should be")
    return value


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise damaged(name, f"the text {value[:40]!r} is not UTF-8") from None
