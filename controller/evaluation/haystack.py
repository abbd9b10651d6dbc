"""Documents for retrieval tests: sentences that are asked for later, among filler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvq.controller.evaluation.filler import Filler
from kvq.runtime.errors import CalibrationError, ContextError

THINGS = (
    "access code", "locker number", "phone extension", "invoice number", "badge number", "ticket number",
    "case number", "order number", "account number", "serial number", "licence number", "membership number",
)  # fmt: skip
FIRST = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis", "Maria",
    "Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa", "Ursula", "Victor", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
LAST = (
    "Adler", "Brandt", "Castillo", "Dubois", "Eriksen", "Fischer", "Grant", "Haddad", "Ivanova", "Jensen", "Kowalski",
    "Lindgren", "Moretti", "Novak", "Okafor", "Petrov", "Quinn", "Romano", "Sharma", "Tanaka", "Ueda", "Vargas",
    "Weber", "Young", "Zhang",
)  # fmt: skip
DISTRACTORS = 8  # further sentences of the form that is asked for, in a document of kind "multi"
HOPS = 2  # variables of a chain that take their value from another one


@dataclass(frozen=True)
class Question:
    """What is asked of a document.

    Attributes:
        asked: the question.
        begun: the beginning of its answer, up to what is looked for.
        answer: what comes next.
        depth: where that stands: share of the document's sentences before it.
    """

    asked: str
    begun: str
    answer: str
    depth: float


@dataclass(frozen=True)
class Haystack:
    """A document and what is asked of it.

    Attributes:
        kind: of `KINDS`, see `haystack`.
        text: the document.
        questions: in the order of the document.
    """

    kind: str
    text: str
    questions: list[Question]


# Sentences, with the share of the document before each, and what is asked.
Planted = tuple[list[tuple[float, str]], list[Question]]


def haystack(
    kind: str,
    depths: int,
    tokens: int,
    filler: Filler,
    rng: np.random.Generator,
    length: Callable[[Haystack], int],
) -> Haystack:
    """The longest document of a kind that keeps to a length.

    Args:
        kind: "single": each question is about another thing; "multi": all are about the same thing of other people,
            among further sentences of that form, at random depths as the variables of "variables", whose values are
            handed on from one to the next, twice.
        depths: questions; what the others ask for stands at as many depths, evenly spread.
        tokens: most of the document with a question and its answer.
        filler: what the rest of it is made of.
        rng: draws everything.
        length: tokens of a document with its longest question and answer.

    Raises:
        CalibrationError: the filler is too short, or the tokens have no room for a sentence of it at each depth.
    """
    sentences = filler.draw(tokens, rng)
    planted, questions = PLANT[kind](depths, _Draw(rng, "".join(sentences)))
    planted.sort()

    def of(count: int) -> Haystack:
        pieces = sentences[:count]
        for depth, sentence in reversed(planted):
            pieces.insert(round(depth * count), sentence + " ")
        return Haystack(kind, "".join(pieces).rstrip(), questions)

    def fits(count: int) -> bool:
        try:
            return length(of(count)) <= tokens
        except ContextError:  # far more than the model has room for, so that it is not encoded at all
            return False

    low, high = 0, len(sentences)
    if fits(high):
        raise CalibrationError(
            f"{filler.name} is too short to fill {tokens} tokens; give a longer one with --text, or fewer --tokens"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < depths:
        raise CalibrationError(
            f"{tokens} tokens are too few for the {len(planted)} sentences of {kind} with {depths} depths among filler;"
            " give more --tokens or fewer --depths"
        )
    return of(low)


class _Draw:
    """Names and numbers of one document, none twice."""

    def __init__(self, rng: np.random.Generator, filler: str) -> None:
        self.rng = rng
        self._names = zip(*(rng.permutation(pool).tolist() for pool in (FIRST, LAST)), strict=True)
        self._taken = filler

    def name(self) -> str:
        return " ".join(next(self._names))

    def number(self) -> str:
        """Five digits that stand nowhere in the filler."""
        while (number := str(self.rng.integers(10_000, 100_000))) in self._taken:
            pass
        self._taken += f" {number}"
        return number


def _fact(thing: str, name: str, value: str, depth: float) -> tuple[tuple[float, str], Question]:
    """The sentence that says a value, and the question that asks for it."""
    said = f"The {thing} of {name} is"
    asked = f"According to the text, what is the {thing} of {name}?"
    return (depth, f"{said} {value}."), Question(asked, said, value, depth)


def _spread(depths: int) -> list[float]:
    """Depths from the beginning to the end; a single one is in the middle."""
    return np.linspace(0, 1, depths).tolist() if depths > 1 else [0.5]


def _single(depths: int, draw: _Draw) -> Planted:
    things = draw.rng.permutation(THINGS)[:depths].tolist()
    facts = [
        _fact(thing, draw.name(), draw.number(), depth) for thing, depth in zip(things, _spread(depths), strict=True)
    ]
    return [sentence for sentence, _ in facts], [question for _, question in facts]


def _multi(depths: int, draw: _Draw) -> Planted:
    places = [*_spread(depths), *draw.rng.random(DISTRACTORS).tolist()]
    facts = [_fact(THINGS[0], draw.name(), draw.number(), depth) for depth in places]
    return [sentence for sentence, _ in facts], [question for _, question in facts[:depths]]


def _variables(depths: int, draw: _Draw) -> Planted:
    planted: list[tuple[float, str]] = []
    questions: list[Question] = []
    while len(questions) < depths:
        value, before = draw.number(), ""
        # Each stands behind the one that it takes its value from.
        for depth in np.sort(draw.rng.random(1 + HOPS)).tolist():
            name = draw.name().split()[0]
            (place, sentence), question = _fact("number", name, value, depth)
            planted.append((place, f"{question.begun} the same as that of {before}." if before else sentence))
            questions.append(question)
            before = name
    return planted, questions[:depths]


PLANT: dict[str, Callable[[int, _Draw], Planted]] = {"single": _single, "multi": _multi, "variables": _variables}
KINDS = tuple(PLANT)
MOST = len(THINGS)  # depths
