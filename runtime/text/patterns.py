"""Regular expressions of a stranger's tokenizer: those whose time grows faster than the square of a text's length."""

from __future__ import annotations

import re
import time

from tokenizers import Regex, pre_tokenizers

MOST_PATTERN = 20_000  # characters of a regular expression
# A repetition of up to so many is none: it cannot take long.
FEW = 16
# What an expression is tried on, so many times each: kinds of characters, besides those that it names itself.
TRIED = (" ", "\n", "\t", "a", "A", "0", ".", "'", "\u00e9", "\u6f22", "\u0301")
LENGTHS = (50, 100, 200, 400)
NAMED = 16  # characters, and words, of the expression
QUADRATIC = r"\s+$"
# Times what a quadratic expression takes for the longest text: a cubic one takes ninety of it, those of
# published tokenizers one.
MOST = 25


def wrong_pattern(pattern: str) -> str:
    """Why a regular expression is not used; empty if it is.

    One of exponential time is known by its form. One of cubic time is tried: on short texts, which no other takes long
    for. It is compared with a quadratic one on the same machine, and refused if it is far slower twice.
    """
    if len(pattern) > MOST_PATTERN:
        return f"has more than {MOST_PATTERN} characters"
    if wrong := _exponential(pattern):
        return wrong
    if _slow(pattern):
        return "takes more than quadratic time"
    return ""


def _slow(pattern: str) -> bool:
    """Whether some text takes far longer than a quadratic expression takes for a text as long as the longest one."""
    split = _compiled(pattern)
    if split is None:
        return False
    characters = dict.fromkeys(c for c in pattern if c.isprintable() and c not in "()[]{}|*+?^$")
    words = dict.fromkeys(re.findall(r"\w{2,8}", pattern))
    most = _most()
    for tried in (*TRIED, *list(characters)[:NAMED], *list(words)[:NAMED]):
        for length in LENGTHS:
            # What ends the text, so that a match fails late: no such character, and out of reach all that it demands.
            text = tried * length + "\0\n\0" + pattern[:100]
            if _seconds(split, text) > most:
                if _seconds(split, text) > _most():  # again: the machine may have done something else
                    return True
                break
    return False


def _most() -> float:
    """Seconds that an expression may take."""
    split = pre_tokenizers.Split(Regex(QUADRATIC), "isolated")
    # The least of some: a busy machine only ever adds.
    return MOST * min(_seconds(split, " " * LENGTHS[-1] + "\0") for _ in range(5))


def _compiled(pattern: str) -> pre_tokenizers.Split | None:
    """What cuts texts by an expression; None: it is none, which others say."""
    try:
        return pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception:
        return None


def _seconds(split: pre_tokenizers.Split, text: str) -> float:
    """Processor time of cutting a text; infinite where the library gives up."""
    begun = time.thread_time()
    try:
        split.pre_tokenize_str(text)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException:  # a panic is not an Exception
        return float("inf")
    return time.thread_time() - begun


# An escape; a class of characters, with one inside; a repetition; a group's beginning or end; an alternative.
PARTS = re.compile(
    r"(?P<back>\\[1-9]|\\[kg]\s*[<'])|(?P<escape>\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.))"
    r"|(?P<class>\[\^?\]?(?:\\.|\[\^?(?:\\.|[^\]\\])*\]|[^\]\\])*\])"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})|(?P<open>\()|(?P<close>\))|(?P<or>\|)",
    re.S,
)


def _exponential(pattern: str) -> str:
    """Why a regular expression may take exponential time; empty if it does not.

    That is where a repeated group holds a repetition, or a choice: one text can then be cut in exponentially many ways.
    No pre-tokenizer of a known model has that, nor references back.
    """
    inside = [False]  # of each open group: whether it holds a repetition or a choice
    closed, end = False, 0  # whether what was just read is a group that does
    for part in PARTS.finditer(pattern):
        kind, text = part.lastgroup, part[0]
        if kind == "back":
            return "refers back to what it has matched"
        if kind == "repeat" and _many(text):
            if closed and part.start() == end:
                return "repeats a group that holds a repetition or a choice"
            inside[-1] = True
        elif kind == "or":
            inside[-1] = True
        elif kind == "open":
            inside.append(False)
        closed = False
        if kind == "close" and len(inside) > 1:
            closed = inside.pop()
            inside[-1] |= closed
        end = part.end()
    return ""


def _many(repeat: str) -> bool:
    """Whether a repetition is one of many."""
    if repeat in "*+":
        return True
    counts = [int(number) for number in re.findall(r"\d+", repeat[:40])]
    return bool(counts) and (repeat.rstrip("}").endswith(",") or max(counts) > FEW)
