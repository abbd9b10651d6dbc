"""What people see besides an answer's text: how far its prompt has been read, and why there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.runtime.session.generation import Response
    from kvq.runtime.session.model import Model
    from kvq.runtime.text.template import ChatTemplate

# Fewer tokens are read before a bar could be looked at.
LEAST_TOKENS = 256
SECONDS_BETWEEN = 0.1
WIDTH = 24


class Bar:
    """A line on a terminal's stderr that grows with the tokens read, and is gone before text comes.

    Called as `Session.append`'s progress.

    Args:
        shown: whether the user wants it; it is drawn on a terminal only.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._drawn = 0  # characters on the line
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._shown or total <= LEAST_TOKENS or now < self._last + SECONDS_BETWEEN:
            return
        self._last = now
        part = done * WIDTH // total
        line = f"reading [{'#' * part}{'-' * (WIDTH - part)}] {done:,} of {total:,} tokens"
        sys.stderr.write("\r" + line.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(line)

    def clear(self) -> None:
        """Leave the line empty and the cursor at its beginning, as it was."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0


def why_empty(
    text: str, last: Response | None, model: Model, template: ChatTemplate | None, generation: dict[str, Any]
) -> str | None:
    """Why an answer has nothing to show; None for one that has, or that was interrupted.

    Args:
        text: of the answer.
        last: its last response.
        model: it came from.
        template: that it was asked through, if through one.
        generation: options of `Session.generate`.
    """
    shown = text if template is None else text.strip()  # blanks are a text, but no answer
    if shown or last is None or last.finish_reason is None:
        return None
    what = "the text" if template is None else "its answer"
    tokens = last.index + 1
    count = f"{tokens} token{'s' * (tokens != 1)}"
    if last.finish_reason == "length":
        return f"nothing to show in {count}; -n sets how many"
    if last.finish_reason == "context":
        return f"the context of {model.architecture.context} tokens is full"
    ends = [*model.bundle.manifest.eos_token_ids, *(template.stop_tokens if template else ())]
    given = generation.get("stop_tokens", ())
    if last.token in given or (last.token in ends and not generation.get("ignore_eos")):
        tokenizer = model.optional_tokenizer
        name = (tokenizer.id_to_token(last.token) if tokenizer else None) or f"token {last.token}"
        when = "at once" if tokens == 1 else f"after {tokens - 1} without a word"
        hint = "" if template or last.token in given else ": it goes on with texts, and for it this one was complete"
        return f"the model ended {what} {when} ({name}){hint}"
    return f"the model began {what} with {_one_of([*(template.stop if template else ()), *generation.get('stop', ())])}"


def _one_of(stops: Sequence[str]) -> str:
    named = " or ".join(repr(stop) for stop in stops)
    return f"a stop string ({named})" if len(named) < 80 else "a stop string"
