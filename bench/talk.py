"""What the clients of a load test say: conversations about the calibration text, the same for the same numbers."""

from __future__ import annotations

import importlib.resources
import re
import time
from dataclasses import dataclass, field
from types import SimpleNamespace as Load  # what the clients do: the options of `kvq.bench.serve` by their names

import numpy as np

TEMPERATURE = 0.8


@dataclass
class Turn:
    """A request and what came of it; times in seconds from the request, `gaps` between pieces of text."""

    messages: list[dict[str, str]]
    seed: int
    text: str = ""
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0

    def hear(self, text: str, begun: float, last: float) -> float:
        """Take a piece of text; begun, last: when the request and the piece before came. Returns when this one did."""
        now = time.perf_counter()
        if self.text:
            self.gaps.append(now - last)
        else:
            self.first = now - begun
        self.text += text
        return now


class Talk:
    """One client's conversations, of which each takes a turn before the first takes its next.

    Args:
        number: seeds what is said.
        load: how many conversations are open, and of how many turns they are.
        sentences: to say.

    Attributes:
        place: conversation that the last turn was of.
    """

    def __init__(self, number: int, load: Load, sentences: list[str]) -> None:
        self._generator = np.random.default_rng(number)
        self._sentences, self._longest = sentences, 2 * load.turns + 1
        self._opened: list[list[dict[str, str]]] = [[] for _ in range(load.conversations)]
        self.place = -1

    def next(self) -> Turn:
        """The next turn; `said` is called before the one after it."""
        self.place = (self.place + 1) % len(self._opened)
        messages = self._opened[self.place]
        if not messages or len(messages) >= self._longest:
            messages[:] = [{"role": "system", "content": self._some(int(self._generator.integers(4, 16)))}]
        messages.append({"role": "user", "content": self._some(1)})
        return Turn(list(messages), int(self._generator.integers(1 << 31)))

    def said(self, text: str) -> None:
        """What was answered."""
        self._opened[self.place].append({"role": "assistant", "content": text})

    def _some(self, count: int) -> str:
        at = int(self._generator.integers(0, len(self._sentences) - count))
        return " ".join(self._sentences[at : at + count])


def talks(load: Load, turn: int = 0) -> list[Talk]:
    """A talk for each client; of another turn they are about other things."""
    text = importlib.resources.files("kvq.exporter").joinpath("calibration.txt").read_text(encoding="utf-8")
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [Talk(turn * load.clients + number, load, sentences) for number in range(load.clients)]
