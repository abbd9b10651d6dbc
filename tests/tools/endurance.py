"""Many decode steps in one process, with all that a session can go through: memory, descriptors and threads stay.

    python -m tests.tools.endurance --steps 100000 --json endurance.json

A handful of sessions and a conversation live at a time. Each turn one of them reads, decodes, is trimmed, forked, saved
and loaded, closed, or (the conversation) forgets its oldest turns. After every turn the session is compared with a slow
model: the ids that it was given, each stored once; bytes that add up; a budget that is kept; a fork, and a file, that
say the very next logits.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import kvq
from kvq.bench.machine import resident_bytes
from kvq.runtime.errors import ContextError
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session, kv_nbytes
from tests.tools.sessions import positions

SESSIONS = 6
LONGEST = 400  # tokens of a session, but for one in a hundred, which fills the context
KINDS: list[dict[str, Any]] = [
    {"policy": "adaptive", "kv_bits": 3.25}, {"policy": "adaptive", "kv_memory": 1_200_000}, {"policy": "adaptive"},
    {"policy": "rule", "kv_bits": 4.0}, {"policy": "fp16"}, {"policy": "int4"}, {"policy": "mixed"},
    {"policy": "int8", "recent": 0, "sink": 0}, {"policy": "int2", "backend": "numpy"},
    {"policy": "adaptive", "kv_bits": 2.75, "prefill": "chunked", "recent": 40},
]  # fmt: skip


@dataclass
class Sample:
    """What the process held after some steps: bytes resident, file descriptors, threads, Python's objects."""

    steps: int
    seconds: float
    resident_nbytes: int
    descriptors: int
    threads: int
    objects: int


@dataclass
class Endurance:
    """A run. `turns` counts what was done, by name."""

    model: Model
    folder: Path
    seed: int = 0
    steps: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.begun = time.monotonic()
        self.sessions: list[tuple[Session, list[int]]] = []
        self.conversation: Any = None

    def run(self, steps: int, samples: int = 20) -> None:
        """So many decode steps, and as many samples at equal distances."""
        while self.steps < steps:
            self._turn()
            if self.steps >= len(self.samples) * steps / samples:
                self._sample()
        self._sample()

    def _sample(self) -> None:
        gc.collect()
        tasks = len(os.listdir("/proc/self/task"))
        assert tasks >= threading.active_count()
        self.samples.append(
            Sample(
                self.steps, time.monotonic() - self.begun, resident_bytes(), len(os.listdir("/proc/self/fd")), tasks,
                len(gc.get_objects()),
            )
        )  # fmt: skip

    def _turn(self) -> None:
        if len(self.sessions) < SESSIONS:
            self._did("open")
            self.sessions.append((self.model.session(**self.random.choice(KINDS)), []))
        if self.random.random() < 0.1:
            return self._talk()
        at = self.random.randrange(len(self.sessions))
        session, ids = self.sessions[at]
        do = self.random.choice(("read", "decode", "decode", "decode", "trim", "fork", "file", "close"))
        longest = self.model.architecture.context if self.random.random() < 0.01 else LONGEST
        if not ids:
            do = "read"
        elif len(ids) + 64 > longest:
            do = self.random.choice(("trim", "close"))
        self._did(do)
        self.sessions[at] = self._done(do, session, ids)
        if do == "close":
            del self.sessions[at]
        else:
            self._compare(*self.sessions[at])

    def _done(self, do: str, session: Session, ids: list[int]) -> tuple[Session, list[int]]:
        """A session and the ids it has been given, after it was made to do something."""
        draw, vocab = self.random, self.model.architecture.vocab
        if do == "read":
            new = [draw.randrange(vocab) for _ in range(draw.choice((1, 2, 17, 60)))]
            session.append(new)
            return session, ids + new
        if do == "decode":
            options: dict[str, Any] = {"temperature": draw.choice((0.0, 0.9)), "ignore_eos": True}
            said = [r.token for r in session.generate(None, max_tokens=draw.choice((1, 8, 48)), **options)]
            self.steps += len(said)
            return session, ids + said
        if do == "trim":
            length = draw.randrange(len(ids) + 1 - len(session.pending))
            session.trim(length)
            return session, ids[:length]
        if do == "fork":
            twin = session.fork()
            assert kv_nbytes([session, twin]) <= session.store.nbytes + twin.store.nbytes
            self._same_next(session, twin)
            return session.fork(), ids
        if do == "file":
            path = self.folder / f"{draw.randrange(4)}.kvq"
            session.save(path)
            self._same_next(session, self._loaded(path, session))
            return self._loaded(path, session), ids
        return session, ids

    def _loaded(self, path: Path, session: Session) -> Session:
        return self.model.load_session(path, backend=session.backend.name)

    def _same_next(self, session: Session, twin: Session) -> None:
        """A twin says what the session would, to the bit; neither the session nor the step counts."""
        if session.room < 2 + len(session.pending):
            return
        other = session.fork()
        assert np.array_equal(other.append([7]), twin.append([7]))

    def _compare(self, session: Session, ids: list[int]) -> None:
        """The session beside what it was given."""
        assert [*session.tokens, *session.pending] == ids
        found = positions(session)
        outside = len(session.tokens) - found.pop("recent")
        assert sorted(at for where in found.values() for at in where) == list(range(outside))
        store = session.store
        assert sum(row["nbytes"] for row in store.account().values()) == store.nbytes
        if session.kv_memory:
            assert store.nbytes <= session.kv_memory

    def _talk(self) -> None:
        """A turn of the conversation, which forgets its oldest ones where there is no more room."""
        self._did("reply")
        if self.conversation is None or self.random.random() < 0.02:
            self.conversation = self.model.chat(system="Be brief.", policy="adaptive", kv_bits=3.25)
        try:
            said = sum(1 for _ in self.conversation.reply("And then? " * 6, max_tokens=40, ignore_eos=True))
        except ContextError:
            self._did("forget")
            self.conversation.forget(200)
            return
        self.steps += said

    def _did(self, name: str) -> None:
        self.turns[name] = self.turns.get(name, 0) + 1


@click.command()
@click.option("--steps", default=100_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="file of the samples")
def main(steps: int, seed: int, file: Path | None) -> None:
    """Run, and say what was held at the beginning and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        endurance = Endurance(kvq.load("kvq-books"), Path(folder), seed)
        endurance.run(steps)
    for sample in endurance.samples:
        print(
            f"{sample.steps:>8} steps {sample.seconds:>8.0f} s {sample.resident_nbytes / 1e6:>8.1f} MB"
            f" {sample.descriptors:>4} descriptors {sample.threads:>4} threads {sample.objects:>8} objects"
        )
    print(", ".join(f"{count} {name}" for name, count in sorted(endurance.turns.items())))
    if file:
        file.write_text(json.dumps({"turns": endurance.turns, "samples": [asdict(s) for s in endurance.samples]}))


if __name__ == "__main__":
    main()
