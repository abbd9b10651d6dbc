"""The steps of a tokenizer.json: normalizers, pre-tokenizers, post-processors and decoders of a stranger.

The library reads a step from a list as well as from an object, and guesses the type of one that names none. Here a step
is an object of a known type, with values of the types that it is written with: what is looked at is what is used.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator
from typing import Any

from kvq.runtime.text.forms import never_empty
from kvq.runtime.text.patterns import wrong_patterns

MOST_STEPS = 64  # of all parts together
DEEPEST = 8  # sequences in sequences
# Characters that normalizing, or decoding, makes of one. A published table (nmt_nfkc) has 18 for U+FDFA, published
# replacements one for one, and a space before a text may be before each character.
MOST_GROWTH = 40
MOST_TEXT = 64  # characters of what a step puts before, behind or in place of something, or looks for
MOST_ENDS = 64  # tokens that are put before and behind a text
MOST_TABLE = 1 << 22  # characters of a table of normalizations; published ones have 320,000
MOST_TYPES = 1 << 32  # above every number that a step may have

# Part -> (the name of what a sequence holds, types of its steps).
PARTS: dict[str, tuple[str, frozenset[str]]] = {
    "normalizer": ("normalizers", frozenset({
        "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend",
        "Replace", "Strip", "StripAccents"})),
    "pre_tokenizer": ("pretokenizers", frozenset({
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation",
        "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"})),
    "post_processor": ("processors", frozenset({
        "BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"})),
    "decoder": ("decoders", frozenset({
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})),
}  # fmt: skip
SEQUENCE = "Sequence"


def wrong_steps(document: dict[str, Any]) -> str:
    """What is wrong with the steps of a tokenizer.json; empty if nothing."""
    try:
        found = {part: _steps(document.get(part), part) for part in PARTS}
        steps = [step for each in found.values() for step in each]
        if len(steps) > MOST_STEPS:
            return f"has {len(steps)} steps, more than {MOST_STEPS}"
        for step in steps:
            _plain(step)
        regexes = [kind[1] for step in steps if (kind := pattern_of(step)) and kind[0] == "Regex"]
        regex, wrong = wrong_patterns(regexes)
        if wrong:
            return f"has the regular expression {regex!r:.40}, which {wrong}"
        for part in ("normalizer", "decoder"):
            if growth_of(found[part]) > MOST_GROWTH:
                return f"makes more than {MOST_GROWTH} characters of one"
        if sum(map(_ends, found["post_processor"])) > MOST_ENDS:
            return f"puts more than {MOST_ENDS} tokens around a text"
    except ValueError as error:
        return str(error)
    return ""


def normalizing_growth(document: dict[str, Any]) -> float:
    """How many characters normalizing makes of one, at most, in a tokenizer.json whose steps are right."""
    return growth_of(_steps(document.get("normalizer"), "normalizer"))


def kinds(part: dict[str, Any] | None) -> list[str]:
    """Types of the steps of a part, in order."""
    if part is None:
        return []
    inner = next((part[name] for name, _ in PARTS.values() if part["type"] == SEQUENCE and name in part), None)
    return [part["type"]] if inner is None else [kind for each in inner for kind in kinds(each)]


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a part, those of sequences one by one.

    Raises:
        ValueError: one is none, or there are too many; as for all of these, it says what is wrong.
    """
    found: list[dict[str, Any]] = []
    for step in _walked(part, name, 0) if part is not None else ():
        found.append(step)
        if len(found) > MOST_STEPS:
            raise ValueError(f"has more than {MOST_STEPS} steps")
    return found


def _walked(step: Any, name: str, depth: int) -> Iterator[dict[str, Any]]:
    holds, types = PARTS[name]
    if not isinstance(step, dict):
        raise ValueError(f"has a {name} that is no object")
    kind = step.get("type")
    if kind != SEQUENCE:
        if not isinstance(kind, str) or kind not in types:
            raise ValueError(f"has a {name} of the type {kind!r:.40}, which is not known")
        yield step
        return
    if depth == DEEPEST:
        raise ValueError(f"has a {name} of more than {DEEPEST} sequences in each other")
    inner = step.get(holds)
    if not isinstance(inner, list) or len(inner) > MOST_STEPS:
        raise ValueError(f"has a sequence without {holds}, or with more than {MOST_STEPS}")
    for each in inner:
        yield from _walked(each, name, depth + 1)


def _plain(step: dict[str, Any]) -> None:
    """Look at the values of a step: a text is short, a number small, other than where something else looks at it."""
    for name, value in step.items():
        if name in ("pattern", "precompiled_charsmap", "single", "pair", "special_tokens"):
            continue
        texts = value if isinstance(value, list) else [value]  # [token, id] of a post-processor
        for text in texts[:3]:
            if isinstance(text, str) and len(text) > MOST_TEXT:
                raise ValueError(f"has a {step['type']} with a {name!r:.40} of more than {MOST_TEXT} characters")
            if isinstance(text, int | float) and not abs(text) < MOST_TYPES:
                raise ValueError(f"has a {step['type']} with a {name!r:.40} that is too large")
        if len(texts) > 3 or isinstance(value, dict):
            raise ValueError(f"has a {step['type']} with a {name!r:.40} that is not known")
    if step["type"] in ("Replace", "Split") and pattern_of(step) is None:
        raise ValueError(f"has a {step['type']} without a pattern")
    if step["type"] == "FixedLength" and (type(step.get("length", 1)) is not int or step.get("length", 1) < 1):
        raise ValueError("cuts text into pieces of no length")
    if step["type"] == "Strip" and any(
        type(step.get(name, 0)) is int and step.get(name, 0) > MOST_TEXT for name in ("start", "stop")
    ):
        raise ValueError(f"strips more than {MOST_TEXT} characters")


def pattern_of(step: dict[str, Any]) -> tuple[str, str] | None:
    """What a step looks for: ("Regex" or "String", text); None where it looks for nothing."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return None
    kind, text = next(iter(pattern.items()))
    return (kind, text) if kind in ("Regex", "String") and isinstance(text, str) else None


def growth_of(steps: list[dict[str, Any]]) -> float:
    """How many characters steps, one behind the other, make of one, at most."""
    growth = 1.0
    for step in steps:
        growth *= _growth(step)
    return growth


def _growth(step: dict[str, Any]) -> float:
    """How many characters a step makes of one, at most, before the next one sees them.

    What Unicode's own normal forms make of a character is not counted: it is little, and nothing more the second time.
    """
    kind, content = step["type"], step.get("content")
    if kind == "Precompiled":
        return max(1.0, _longest_entry(step.get("precompiled_charsmap")))
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend") or ""))  # between added tokens a text may have one character
    if kind in ("BPEDecoder", "CTC"):  # an empty text is found between any two characters
        return 2.0
    if kind != "Replace" or not isinstance(content, str):
        return 1.0
    how, text = pattern_of(step) or ("String", "")
    if how == "Regex":
        return max(1.0, float(len(content))) if never_empty(text) else 1.0 + len(content)
    return max(1.0, len(content) / len(text)) if text else 1.0 + len(content)


def _longest_entry(table: Any) -> int:
    """Characters of the longest text that a table of normalizations puts in place of another.

    Its first four bytes say how many bytes of a trie follow; behind it stand texts, each with a zero at its end.
    """
    if not isinstance(table, str) or len(table) > MOST_TABLE:
        raise ValueError("has a table of normalizations that is no text, or too long")
    try:
        data = base64.b64decode(table, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("has a table of normalizations that is not base64") from None
    if len(data) < 4 or (size := struct.unpack_from("<I", data)[0]) % 4 or not 4 <= size <= len(data) - 4:
        raise ValueError("has a table of normalizations whose size is not what it says")
    try:
        texts = data[4 + size :].decode()
    except UnicodeDecodeError:
        raise ValueError("has a table of normalizations that is no UTF-8") from None
    return max(map(len, texts.split("\0")))


def _ends(step: dict[str, Any]) -> int:
    """How many tokens a post-processor puts around a text.

    Raises:
        ValueError: the text itself comes twice, or the step is not written as the library writes it.
    """
    if step["type"] != "TemplateProcessing":
        return 2 * (step["type"] != "ByteLevel")
    tokens, most = step.get("special_tokens"), 0
    if not isinstance(tokens, dict):
        raise ValueError("has a template without special tokens")
    for name in ("single", "pair"):
        pieces, count = step.get(name), 0
        if not isinstance(pieces, list) or len(pieces) > MOST_ENDS + 2:
            raise ValueError(f"puts more than {MOST_ENDS} tokens around a text, or has a template that is no list")
        seen = []
        for piece in pieces:
            if not isinstance(piece, dict) or len(piece) != 1:
                raise ValueError("has a template of other pieces than objects")
            kind, value = next(iter(piece.items()))
            index = value.get("id") if isinstance(value, dict) else None
            if not isinstance(index, str):
                raise ValueError("has a piece of a template without an id")
            if kind == "Sequence":
                seen.append(index)
            else:
                token = tokens.get(index)
                ids = token.get("ids") if isinstance(token, dict) else None
                count += len(ids) if isinstance(ids, list) else 1
        if len(seen) != len(set(seen)):
            raise ValueError("has a template that repeats the text")
        most = max(most, count)
    return most
