"""A context that is full: its oldest part goes, and what stays is read anew, in its new places.

Positions are in the stored keys, so a token cannot move; that is why what stays is processed again. Half of what is not
protected goes at a time, which makes the price of a token generated at most that of reading one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvq.runtime.errors import SamplingError
from kvq.runtime.keywords import is_integer

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


class Kept(NamedTuple):
    """What stays. ids: of the text; begun: how many of them come before what is generated."""

    ids: list[int]
    begun: int


# (ids of the text that does not fit, how many come before what is generated, how many of the newest have to stay) ->
# what stays of it, fewer than the context has.
Shift = Callable[[Sequence[int], int, int], Kept]
# As callers say it: no, the sinks stay, so many first tokens stay, or a function that says what stays.
ContextShift = bool | int | Shift


@dataclass
class Shifts:
    """What a session has lost to make room since it was made or loaded.

    Attributes:
        times: how often.
        tokens: that were removed.
        begun: tokens that now come before what is generated.
    """

    times: int = 0
    tokens: int = 0
    begun: int = 0

    def add(self, tokens: int) -> None:
        """So many tokens have gone at once."""
        self.times += 1
        self.tokens += tokens


def most_protected(context: int) -> int:
    """Most tokens that may be protected: with more, half of the rest is gone again too soon."""
    return context * 3 // 4


def sliding(keep: int, context: int) -> Shift:
    """The first `keep` tokens stay, and the newer half of what can stand behind them."""

    def kept(ids: Sequence[int], begun: int, newest: int) -> Kept:
        removed = len(ids) - keep - max((context - keep) // 2, newest)
        return Kept([*ids[:keep], *ids[keep + removed :]], min(begun, keep) + max(0, begun - keep - removed))

    return kept


def least_dropped(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """How many of the oldest turns go: at least `least`, and all `most` where with fewer it does not fit."""
    return least + bisect.bisect_left(range(least, most), True, key=fits)


class TurnShift:
    """Of a conversation the oldest turns go; of one that is a single turn the older half of the reply.

    Args:
        prompt_of: ids up to the reply, where the oldest so many turns are gone.
        turns: how many turns can go: all but the last.
        context: of the model, in tokens.
        otherwise: where prompt and question alone take more than may be protected.

    Attributes:
        dropped: turns that are gone.
    """

    def __init__(
        self, prompt_of: Callable[[int], Sequence[int]], turns: int, context: int, otherwise: Callable[[], Shift]
    ) -> None:
        self._prompt_of, self._turns, self._context, self._otherwise = prompt_of, turns, context, otherwise
        self.dropped = 0

    def __call__(self, ids: Sequence[int], begun: int, newest: int) -> Kept:
        reply = [*ids[begun:]]

        def fits(dropped: int) -> bool:
            return len(self._prompt_of(dropped)) + len(reply) <= self._context // 2

        self.dropped = least_dropped(min(self.dropped + 1, self._turns), self._turns, fits)
        prompt = [*self._prompt_of(self.dropped)]
        if len(prompt) > most_protected(self._context):
            return self._otherwise()(ids, begun, newest)
        if len(prompt) + len(reply) <= most_protected(self._context):
            return Kept(prompt + reply, len(prompt))
        left = max((self._context - len(prompt)) // 2, newest)
        return Kept(prompt + reply[max(0, len(reply) - left) :], len(prompt))


def of_messages(
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[Sequence[Mapping[str, Any]]], Sequence[int]],
    context: int,
    sink: int,
) -> Shift:
    """What stays of a conversation: the system turn, the newest turns, of the last one the question.

    Args:
        messages: {"role", ...} each, up to the reply.
        encode: ids of such messages, by the chat template.
        context: of the model, in tokens.
        sink: first tokens that stay where the system turn takes more than may be protected.
    """
    first = next((at for at, each in enumerate(messages) if each["role"] not in ("system", "developer")), len(messages))
    starts = [at for at, each in enumerate(messages) if each["role"] == "user"] or [first]

    def prompt_of(dropped: int) -> Sequence[int]:
        return encode([*messages[:first], *messages[starts[dropped] :]] if dropped else messages)

    def otherwise() -> Shift:
        asked = [encode([*messages[:first], {"role": "user", "content": each}]) for each in ("A", "z")]
        system = next((at for at, (a, b) in enumerate(zip(*asked, strict=False)) if a != b), 0)
        return sliding(system if system <= most_protected(context) else min(sink, most_protected(context)), context)

    return TurnShift(prompt_of, len(starts) - 1, context, otherwise)


def shift_of(session: Session, option: ContextShift) -> Shift | None:
    """The option as a function; None where a full context ends the text.

    Raises:
        SamplingError: more first tokens are to stay than may be protected, or it is none of what it may be.
    """
    if option is False or callable(option):
        return option or None
    context = session.model.architecture.context
    most = most_protected(context)
    if option is True:
        return sliding(min(session.store.sink, most), context)
    if not is_integer(option) or not 0 <= option <= most:
        raise SamplingError(
            f"context_shift must be true, false, or how many first tokens stay, 0 to {most} in a context of {context},"
            f" got {option!r:.60}"
        )
    return sliding(int(option), context)


def begin_anew(session: Session, kept: Kept, new: int = 0) -> int:
    """Leave these ids to the session, all of them to be read by the next append; returns `kept.begun`.

    new: how many of them come on top of its text so far.
    """
    session.shifts.add(len(session.tokens) + len(session.pending) + new - len(kept.ids))
    session.shifts.begun = kept.begun
    session.trim(0)
    session.pending[:] = kept.ids
    return kept.begun
