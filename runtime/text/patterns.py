"""Regular expressions of a stranger's tokenizer: those whose time grows faster than a text's length on ordinary text,
or faster than its square on any.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from tokenizers import Regex, normalizers

from kvq.runtime.text.forms import MOST_PATTERN, wrong_form

# What an expression is tried on, so many times each: kinds of characters, besides those that it names itself. The short
# ones come first: what takes exponential time is then found where it takes little.
TRIED = (" ", "\n", "\t", "a", "A", "0", ".", "'", "\u00e9", "\u6f22", "\u0301")
LENGTHS = (1, 3, 6, 12, 25, 50, 100, 200, 400)
NAMED = 16  # characters, and words, of the expression
QUADRATIC = r"\s+$"
# Times what a quadratic expression takes for the longest text: a cubic one takes ninety of it, those of
# published tokenizers one.
MOST = 25
# Likewise for all texts and expressions together; those of published tokenizers take 30 to 60.
MOST_IN_ALL = 500
# Ordinary text, on which time must grow as the text does: four times as much for four times as long.
PROSE = (
    "The quick brown fox jumps over the lazy dog; in 1984 it didn't, and that's all we know. \u201cWhy?\u201d she said "
    "(for the 3rd time), \u2014 but he only said: it's 25.50 EUR, or so. See https://example.org/a?b=c for more!\n\n"
)
CODE = (
    "def find(self, key: str = 'x') -> dict[str, int]:\n    for i in range(10):\n        if a[i] != b and c <= 0x1F:\n"
    '            return {"k": [1, 2.5e-3, None]}  # TODO: why?\n\t<div class="a b">&amp;</div>\r\n#include <stdio.h>\n'
)
MIXED = (
    "\u00c7a co\u00fbte d\u00e9j\u00e0 12 \u20ac, na\u00efve \u00dcbergr\u00f6\u00dfe; \u043f\u0440\u0438\u0432\u0435"
    "\u0442 \u043c\u0438\u0440! \u4eca\u65e5\u306f\u826f\u3044\u5929\u6c17\u3067\u3059\u3002\u4f60\u597d\uff0c\u4e16"
    "\u754c\u3002 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f600\U0001f44d\U0001f3fd\n"
)
ORDINARY = (250, 500, 1000, 2000, 4000)
SHORTER = 2  # place of the length that the longest, four times as long, is compared with
GROWTH = 8.0
LEAST_PAIRS, DOUBT = 9, 0.2  # measurements, and seconds of them, before an expression is refused for it


def wrong_patterns(patterns: Sequence[str]) -> tuple[str, str]:
    """The first regular expression of a tokenizer that is not used, and why; two empty texts if all are.

    One of exponential time is known by its form. One of cubic time is tried: on short texts, which no other takes long
    for. It is compared with a quadratic one on the same machine, and refused if it is far slower twice.
    """
    different = list(dict.fromkeys(patterns))
    for pattern in different:
        if wrong := wrong_form(pattern):
            return pattern, wrong
    if sum(map(len, different)) > MOST_PATTERN:
        return different[0], f"has with the others more than {MOST_PATTERN} characters"
    trial = Trial()
    for pattern in different:
        if wrong := trial.of(pattern):
            return pattern, wrong
    return "", ""


class Trial:
    """Regular expressions that are tried, and the time that is left for it.

    Attributes:
        spent: seconds of processor time so far.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._turn = _turn()

    def of(self, pattern: str) -> str:
        """Why an expression is not used; empty if it is."""
        replace = _compiled(pattern)
        if replace is None:  # it is no expression, which others say
            return ""
        named = list(dict.fromkeys(c for c in pattern if c.isprintable() and c not in "()[]{}|*+?^$"))[:NAMED]
        words = list(dict.fromkeys(re.findall(r"\w{2,8}", pattern)))
        for length in LENGTHS:
            for tried in (*TRIED, *named, *words[:NAMED]):
                # What ends the text, so that a match fails late: no such character, and out of reach all that it
                # demands.
                text = tried * length + "\0\n\0" + (pattern[:100] if length >= LENGTHS[-4] else "")
                if wrong := self._slow(replace, text):
                    return wrong
        # Its own words too: what sets off its slow part may stand behind more of them than were tried one by one.
        own = (" ".join(words)[:2000] + " ", re.sub(r"[()\[\]{}|*+?^$\\]+", "", pattern)[:2000] + " ", pattern[:2000])
        for sample in (PROSE, CODE, MIXED, PROSE.upper(), *own):
            if wrong := self._grows(replace, sample):
                return wrong
        return ""

    def _slow(self, replace: normalizers.Replace, text: str) -> str:
        """Whether a text takes far longer than a quadratic expression takes for the longest of the short ones."""
        seconds = self._seconds(replace, text)
        if seconds > MOST * self._turn:
            # Again, unless there is no doubt: the machine may have done something else.
            if seconds < 10 * MOST * self._turn:
                self._turn = max(self._turn, _turn())
                seconds = min(seconds, self._seconds(replace, text))
            if seconds > MOST * self._turn:
                return "takes more than quadratic time"
        if self.spent > MOST_IN_ALL * self._turn:
            self._turn = max(self._turn, _turn())
            if self.spent > MOST_IN_ALL * self._turn:
                return "takes, with the others, far longer than those of published tokenizers"
        return ""

    def _grows(self, replace: normalizers.Replace, sample: str) -> str:
        """Whether time grows faster than a text of that kind does."""
        whole = sample * (ORDINARY[-1] // max(1, len(sample)) + 1)
        for length in ORDINARY:
            if wrong := self._slow(replace, whole[:length]):
                return wrong
        texts = whole[: ORDINARY[SHORTER]], whole[: ORDINARY[-1]]
        shorter = longer = float("inf")
        pairs, begun = 0, self.spent
        while pairs < LEAST_PAIRS or self.spent - begun < DOUBT:
            # The least of all, by turns: a busy machine only ever adds, and for a while.
            shorter, longer = map(min, (shorter, longer), (self._seconds(replace, text) for text in texts))
            pairs += 1
            if longer <= GROWTH * shorter:
                self.spent = begun + shorter + longer  # to be sure took longer, which is not the expression's doing
                return ""
            if longer == float("inf"):
                break
        return "takes time that grows faster than an ordinary text does"

    def _seconds(self, replace: normalizers.Replace, text: str) -> float:
        seconds = _seconds(replace, text)
        self.spent += seconds if seconds < float("inf") else 0.0
        return seconds


def _turn() -> float:
    """Seconds that a quadratic expression takes now, for the longest of the short texts."""
    replace = normalizers.Replace(Regex(QUADRATIC), "")
    # The least of some: a busy machine only ever adds.
    return min(_seconds(replace, " " * LENGTHS[-1] + "\0") for _ in range(5))


def _compiled(pattern: str) -> normalizers.Replace | None:
    """What finds all that an expression matches; None: it is none."""
    try:
        return normalizers.Replace(Regex(pattern), "")
    except Exception:
        return None


def _seconds(replace: normalizers.Replace, text: str) -> float:
    """Processor time of finding all in a text; infinite where the library gives up."""
    begun = time.thread_time()
    try:
        replace.normalize_str(text)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException:  # a panic is not an Exception
        return float("inf")
    return time.thread_time() - begun
