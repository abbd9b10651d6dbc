"""Windows that are asked about: records among the calibration text, and a conversation that wants them back.

In a text that only goes on, what a number or a name says is hardly ever needed again, so storing it badly does no
damage that training could see. A user asks. So a share of the training windows ends in questions about what stands
among its text, and the damage of a token counts what the answers lose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvq.controller.training.texts import sentences
from kvq.runtime.chat.documents import BREAK
from kvq.runtime.errors import ContextError

Messages = Sequence[dict[str, str]]
Encode = Callable[[Messages], list[int]]
TOKENS_A_RECORD = 128  # of the window, for each record; its sentence, question and answer take about 45 of them
CHARACTERS = 6  # of text drawn for each token: more than most have

SYLLABLES = (
    "ba", "bel", "cor", "da", "den", "el", "fa", "gor", "ha", "il", "ja", "kar", "la", "lo", "mar", "mi", "na", "nor",
    "o", "pe", "ra", "ri", "sa", "sel", "ta", "tor", "u", "va", "ver", "wil", "ya", "zo",
)  # fmt: skip
WORDS = (
    "amber", "falcon", "river", "cobalt", "maple", "harbour", "silver", "lantern", "violet", "anchor", "granite",
    "meadow", "copper", "orchid", "thunder", "willow", "ivory", "comet", "saffron", "glacier",
)  # fmt: skip
MONTHS = ("January", "March", "April", "June", "July", "August", "October", "December")


def _digits(rng: np.random.Generator, low: int = 2, high: int = 7) -> str:
    return "".join(map(str, rng.integers(0, 10, int(rng.integers(low, high)))))


def _name(rng: np.random.Generator) -> str:
    return "".join(rng.choice(SYLLABLES, int(rng.integers(2, 4)))).capitalize()


def _words(rng: np.random.Generator) -> str:
    return "-".join(rng.choice(WORDS, 2, replace=False))


# What a record says of somebody, and how such a value is drawn.
VALUES: dict[str, Callable[[np.random.Generator], str]] = {
    "password": lambda rng: f"{_words(rng)}-{_digits(rng, 2, 4)}",
    "telephone": lambda rng: f"{_digits(rng, 3, 4)} {_digits(rng, 4, 6)}",
    "room": lambda rng: _digits(rng, 2, 5),
    "reference": lambda rng: f"{_name(rng)[:2].upper()}-{_digits(rng, 4, 7)}",
    "birthday": lambda rng: f"{rng.integers(1, 29)} {rng.choice(MONTHS)} {rng.integers(1920, 2020)}",
    "appointment": lambda rng: (
        f"{rng.choice(MONTHS)} {rng.integers(1, 29)}, {rng.integers(8, 19)}:{_digits(rng, 2, 3)}"
    ),
    "price": lambda rng: f"{rng.integers(2, 900)}.{rng.integers(10, 100)} euros",
    "e-mail address": lambda rng: f"{_name(rng).lower()}{_digits(rng, 1, 4)}@{rng.choice(WORDS)}.org",
    "home town": _name,
    "code word": _words,
    "score": lambda rng: f"{rng.integers(1, 200)} points",
    "file": lambda rng: f"/{rng.choice(WORDS)}/{_words(rng)}.txt",
}
# How a record is written, and how it is asked for.
FORMS = (
    ("{who}'s {what}: {value}", "What is {who}'s {what}?"),
    ("{what} ({who}) = {value}", "Which {what} belongs to {who}?"),
    ("Please note that {who} has {value} as {what}.", "Please tell me {who}'s {what}."),
    ("| {who} | {what} | {value} |", "Look up the {what} in the row of {who}."),
    ('{{"name": "{who}", "{what}": "{value}"}}', 'What does the record of {who} have under "{what}"?'),
    ("{who} wrote down the {what}, {value}, and went on.", "What did {who} write down as the {what}?"),
    ("As for {who}, we have the {what} as {value}.", "{who}: {what}?"),
)
ANSWERS = ("{value}", "{who}'s {what} is {value}.", "It is {value}.")


class _Record(NamedTuple):
    """What a document says of somebody, where, and how that is asked for and answered."""

    place: float  # share of the document before it
    said: str
    question: str
    answer: str


def _records(count: int, rng: np.random.Generator) -> list[_Record]:
    """Records in the order of their places."""
    answer = str(rng.choice(ANSWERS))
    found = []
    for place in np.sort(rng.random(count)).tolist():
        what = str(rng.choice(list(VALUES)))
        fact = {"who": f"{_name(rng)} {_name(rng)}", "what": what, "value": VALUES[what](rng)}
        said, question = FORMS[rng.integers(len(FORMS))]
        end = "\n" if said[0] in "{|" else " "
        found.append(_Record(place, said.format(**fact) + end, question.format(**fact), answer.format(**fact)))
    return found


def asked(text: str, length: int, encode: Encode, rng: np.random.Generator) -> np.ndarray | None:
    """A document with records among a piece of the text, and a conversation about them.

    Args:
        text: the calibration text.
        length: most tokens.
        encode: a conversation -> token ids.
        rng: draws the piece, the records, their places and the order of the questions.

    Returns:
        int64 [at most length]; None where there is no room for a sentence of the text.
    """
    size = CHARACTERS * length
    start = int(rng.integers(max(0, len(text) - size) + 1))
    pieces = sentences(text[start : start + size])[1:-1]  # the first and the last may be parts of some
    records = _records(max(2, length // TOKENS_A_RECORD), rng)
    in_turn = [records[i] for i in rng.permutation(len(records))]

    def of(count: int) -> list[int]:
        document = pieces[:count]
        for record in reversed(records):
            document.insert(round(record.place * count), record.said)
        questions = [record.question for record in in_turn]
        questions[0] = BREAK.join(("".join(document).rstrip(), questions[0]))
        turns = []
        for question, record in zip(questions, in_turn, strict=True):
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": record.answer}]
        return encode(turns)

    def fits(count: int) -> bool:
        try:
            return len(of(count)) <= length
        except ContextError:  # far more than there is room for
            return False

    low, high = 0, len(pieces) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return np.asarray(of(low), np.int64) if low else None
