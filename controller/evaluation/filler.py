"""Filler: the sentences among which a retrieval test hides what it asks for, from a text or from words put together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvq.controller.training.texts import sentences

# Characters taken per token asked for: more than a token has in any language that a tokenizer was made for.
SLICE = 12

WHO = (
    "The old ferryman", "A baker from the valley", "The schoolmistress", "One of the gardeners", "The station master",
    "A young surveyor", "The widow next door", "The librarian", "A travelling musician", "The harbour pilot",
    "An apprentice", "The village doctor", "The shepherd", "A retired captain", "The clockmaker", "The innkeeper",
    "A student of botany", "The mason", "The miller's daughter", "A painter of signs", "The postman", "The beekeeper",
    "The night watchman", "A weaver",
)  # fmt: skip
DID = (
    "repaired", "described", "carried away", "sold", "borrowed", "looked for", "painted", "remembered", "measured",
    "forgot", "brought home", "admired", "counted", "hid", "exchanged", "drew", "cleaned", "talked about", "waited for",
    "wrote down everything about", "laughed at", "collected", "gave back", "wondered about",
)  # fmt: skip
WHAT = (
    "the copper kettle", "a map of the coast", "three wooden chairs", "the broken window", "an orchard of pear trees",
    "a letter without a stamp", "the painted gate", "some lengths of rope", "a basket of plums", "the church bell",
    "a lantern", "the bench", "two sacks of flour", "a song about the river", "the rusty anchor", "a pair of boots",
    "the stone bridge", "an almanac", "the blue curtain", "a recipe for quince jelly", "the ladder", "a box of nails",
    "the neighbour's dog", "an unfinished story",
)  # fmt: skip
WHERE = (
    "behind the mill", "near the market", "at the edge of the wood", "in the attic", "beside the canal",
    "under the lime trees", "in the reading room", "on the road to the pass", "at the old pier", "in the courtyard",
    "across the meadow", "by the well", "in the back room of the inn", "on the hill", "next to the smithy",
    "along the shore", "below the terrace", "in an empty barn",
)  # fmt: skip
WHEN = (
    "before the rain came", "on a quiet afternoon", "while the others slept", "late in the autumn", "after the harvest",
    "as soon as the snow had melted", "during the fair", "when the lamps were lit", "long before breakfast",
    "in the week of the storm", "on the first warm day", "shortly after noon", "until it grew dark",
    "in the year of the flood", "as every spring", "at the end of the holidays",
)  # fmt: skip
THEN = (
    "Nobody was surprised.", "It took longer than expected.", "The children watched from the fence.",
    "Nothing more was said about it.", "Most people agreed that it was for the best.", "The wind had turned by then.",
    "There was soup for everyone.", "It is still talked about.", "The cat slept through all of it.",
    "A few coins changed hands.", "That was the custom of the place.", "The dust settled slowly.",
)  # fmt: skip


@dataclass(frozen=True)
class Filler:
    """Where filler comes from.

    Attributes:
        text: somebody's own; None puts sentences together from words.
        name: what the text is called in messages.
    """

    text: str | None = None
    name: str = "the built-in text"

    def draw(self, tokens: int, rng: np.random.Generator) -> list[str]:
        """Sentences of at least so many tokens, with the blanks behind each, from a place that the generator chooses.

        Those of the whole text where it is shorter.
        """
        if self.text is None:
            return _put_together(SLICE * tokens, rng)
        size = SLICE * tokens
        start = int(rng.integers(max(0, len(self.text) - size) + 1))
        pieces = sentences(self.text[start : start + size])
        # The first and the last one may be parts of sentences.
        return pieces[start > 0 : len(pieces) - (start + size < len(self.text))]


def _put_together(characters: int, rng: np.random.Generator) -> list[str]:
    """Sentences of at least so many characters.

    Subjects, verbs and places come together in some millions of ways: what repeats is words, not sentences.
    """
    found, length = [], 0
    while length < characters:
        who, did, what, where, when = (pool[rng.integers(len(pool))] for pool in (WHO, DID, WHAT, WHERE, WHEN))
        form = rng.integers(3)
        if form == 0:
            sentence = f"{who} {did} {what} {where} {when}."
        elif form == 1:
            sentence = f"{when[0].upper()}{when[1:]}, {who[0].lower()}{who[1:]} {did} {what}."
        else:
            sentence = f"{who} {did} {what} {where}. {THEN[rng.integers(len(THEN))]}"
        found.append(sentence + " ")
        length += len(found[-1])
    return found
