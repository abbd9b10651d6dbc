"""The form of a regular expression: what is seen of its cost without a text. Read once, from left to right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

MOST_PATTERN = 20_000  # characters of an expression, and its parts once counted repetitions are written out
# A repetition of up to so many is none: it cannot take long.
FEW = 16
# Ways to match one text, as a power of two: of a count or a choice each of its own, of an open repetition two bits.
MOST_WAYS, OPEN_WAYS = 24, 2.0

# Groups whose structure is that of any other. Not those that compute (absent, conditions, callouts), nor comments and
# flags that let an expression hold blanks: what it is made of would stand elsewhere than it seems to.
OPENS = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|<[A-Za-z_]\w{0,30}>|[ims-]{0,8}[:)])|(?![?*]))")
COUNTS = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}")
BACK = re.compile(r"\\(?:[1-9]|[kg]\s*[<'])")
ESCAPE = re.compile(r"\\(?:[pPxo]\{[^{}]{0,64}\}|.)", re.S)
# What an expression's first part must be for it to match no empty text: one character, once at least.
ONE = re.compile(r"(?:\\[sSdDwWhHnrt]|\\[pP]\{\^?\w{1,32}\}|\[\^?\w[^\[\]\\]*\]|[^\W_]|[ \u2581'\"`-])(?![*?]|\{[0,])")


@dataclass
class Part:
    """Something that a repetition can stand behind.

    Attributes:
        many: whether it holds an open or long repetition, or a choice.
        size: parts it has, counted repetitions written out.
        ways: a power of two: in how many ways it may match a text.
    """

    many: bool = False
    size: float = 1.0
    ways: float = 0.0


class Group:
    """An open group: its alternatives so far, and the parts of the last one."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.many, self.size = False, 1.0
        self.ways: list[float] = []  # of the alternatives

    def chosen(self) -> None:
        """An alternative ends here."""
        self.many |= any(part.many for part in self.parts)
        self.size += sum(part.size for part in self.parts)
        self.ways.append(sum(part.ways for part in self.parts))
        self.parts = []

    def whole(self) -> Part:
        """The group, closed."""
        self.chosen()
        return Part(self.many or len(self.ways) > 1, self.size, max(self.ways) + math.log2(len(self.ways)))


def wrong_form(pattern: str) -> str:
    """Why a regular expression is not tried at all; empty if it may be.

    That is above all where a repeated group holds a repetition or a choice: one text can then be cut in exponentially
    many ways. No pre-tokenizer of a known model has that, nor references back.
    """
    if len(pattern) > MOST_PATTERN:
        return f"has more than {MOST_PATTERN} characters"
    groups = [Group()]
    for kind, text in _tokens(pattern):
        group = groups[-1]
        if kind == "wrong":
            return text
        if kind == "open":
            groups.append(Group())
        elif kind == "or":
            group.chosen()
        elif kind == "close" and len(groups) > 1:
            whole = groups.pop().whole()
            groups[-1].parts.append(whole)
        elif kind == "repeat" and group.parts:
            group.parts[-1], wrong = _repeated(group.parts[-1], text)
            if wrong:
                return wrong
        else:
            group.parts.append(Part())
    while len(groups) > 1:
        groups[-2].parts.append(groups.pop().whole())
    return _too_much(groups[0].whole())


def _repeated(part: Part, repeat: str) -> tuple[Part, str]:
    """A part with a repetition behind it, and what is wrong with that."""
    least, most = _counts(repeat)
    many = most > FEW
    if many and part.many:
        return part, "repeats a group that holds a repetition or a choice"
    times = most if math.isfinite(most) else least + 1
    choices = math.log2(most - least + 1) if math.isfinite(most) else OPEN_WAYS
    made = Part(part.many or many, part.size * max(1.0, times), part.ways * max(1.0, times) + choices)
    return made, _too_much(made)


def _too_much(part: Part) -> str:
    if part.size > MOST_PATTERN:
        return f"has more than {MOST_PATTERN} parts when its repetitions are written out"
    if part.ways > MOST_WAYS:
        return f"may match a text in more than 2^{MOST_WAYS} ways"
    return ""


def _counts(repeat: str) -> tuple[float, float]:
    """How often a repetition repeats, at least and at most."""
    if repeat in ("*", "+", "?"):
        return float(repeat == "+"), 1.0 if repeat == "?" else math.inf
    found = COUNTS.fullmatch(repeat)
    low, comma, high = found.groups() if found else ("", "", "")
    least = float(low or 0)
    most = float(high) if high else (math.inf if comma else least)
    return min(least, most), max(least, most)  # {3,1} is {1,3} that gives nothing back


def _tokens(pattern: str) -> Iterator[tuple[str, str]]:
    """What it is made of: part, repeat, open, close, or; wrong with the reason, and no more behind it."""
    at, lazy = 0, False
    while at < len(pattern):
        character, kind, end = pattern[at], "part", at + 1
        if character == "\\":
            if BACK.match(pattern, at):
                yield "wrong", "refers back to what it has matched"
                return
            if pattern[at + 1 : at + 2] in ("c", "C", "M"):
                yield "wrong", "names a control character by a letter"
                return
            found = ESCAPE.match(pattern, at)
            end = found.end() if found else end
        elif character == "[":
            end = _class_end(pattern, at)
        elif character == "(":
            found = OPENS.match(pattern, at)
            if not found:
                yield "wrong", "has a group of a kind that is not known"
                return
            kind, end = "part" if found[0].endswith(")") else "open", found.end()
        elif character in "*+?":
            kind = "repeat"
        elif character == "{" and (found := COUNTS.match(pattern, at)) and (found[1] or found[3]):
            kind, end = "repeat", found.end()
        elif character == "{" and pattern[at + 1 : at + 7].isdigit():
            yield "wrong", "has a count of more than six digits"
            return
        elif character in ")|":
            kind = "close" if character == ")" else "or"
        # Behind * + ? these mean lazy and possessive; behind a count only ? does, + repeats once more.
        if lazy and character in ("?", "+"):
            lazy = False
        else:
            yield kind, pattern[at:end]
            lazy = kind == "repeat" and character != "{"
        at = end


def _class_end(pattern: str, begin: int) -> int:
    """Where a class of characters ends, with those inside of it; the expression's end if it does not."""
    depth, at = 0, begin
    while at < len(pattern):
        character = pattern[at]
        if character == "[":
            depth += 1
            at += 1 + (pattern[at + 1 : at + 2] == "^")
            at += pattern[at : at + 1] == "]"  # the first is a character
        elif character == "]":
            depth, at = depth - 1, at + 1
            if not depth:
                return at
        else:
            at += 2 if character == "\\" else 1
    return at


def never_empty(pattern: str) -> bool:
    """Whether all that an expression matches has a character at least; False where that is not seen at once."""
    return bool(ONE.match(pattern)) and "|" not in pattern and "\\K" not in pattern and "(?" not in pattern
