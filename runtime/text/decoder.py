"""Token ids to text as they come: whole characters only, and stop strings held back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from kvq.runtime.text.tokenizer import decoded, guarded

# Tokens before a continuation that its decoder has to know: no character and no group of invalid bytes is longer.
FOLLOWED = 24


class StreamingDecoder:
    """Turns ids into text piece by piece; a character split over tokens waits until it is whole.

    Only a short tail of ids is decoded each time, so the work per token does not grow.
    (tokenizers' own DecodeStream raises on byte sequences that never become valid, which models
    do produce.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._tail: list[int] = []
        self._shown = 0  # characters of the decoded tail that have been returned
        self._clean = 0  # ids of the tail up to the last whole character
        found = guarded(tokenizer.get_added_tokens_decoder, "to list its added tokens") if skip_special_tokens else {}
        self._skipped = {index for index, token in found.items() if token.special}

    @property
    def whole(self) -> bool:
        """Whether every id pushed so far is part of a character that has been returned."""
        return self._clean == len(self._tail)

    def _decode(self) -> str:
        return decoded(self.tokenizer, self._tail, self.skip_special_tokens)

    def push(self, token: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        if token in self._skipped:  # as the next one's only context it would take away the next one's space
            return ""
        self._tail.append(token)
        text = self._decode()
        # What ends in U+FFFD may yet become a character; byte-fallback tokenizers show one for every
        # byte. After eight ids without a whole character, all but the last are taken as invalid.
        certain = len(text.rstrip("\ufffd"))
        whole = certain == len(text)
        stale = not whole and len(self._tail) - self._clean > 8
        if stale:
            certain = len(text) - 1
        piece, self._shown = text[self._shown : certain], max(certain, self._shown)
        if whole:  # the ids before it are done with, except the last group: it gives the next its context
            self._tail = self._tail[self._clean :]
            self._clean = len(self._tail)
            self._shown = len(self._decode())
        elif stale:  # UTF-8 resynchronises within four bytes
            self._tail, self._clean = self._tail[-4:], 0
            text = self._decode()
            self._shown = len(text) - text.endswith("\ufffd")
        return piece

    def follow(self, tokens: Sequence[int]) -> None:
        """Go on behind a text that has been shown, but for a character that its last tokens leave incomplete."""
        for token in tokens[-FOLLOWED:]:
            self.push(token)

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""
        piece = self._decode()[self._shown :]
        self._tail, self._shown, self._clean = [], 0, 0
        return piece


class StopMatcher:
    """Passes text on, except what is or may become a stop string.

    Args:
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """Text that can be shown; sets `stopped` when a stop string is complete."""
        self._held += text
        # The stop string that is complete first ends the text, however the text was cut into pieces.
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
