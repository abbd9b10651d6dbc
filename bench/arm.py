"""An arm: one way to run the model, in a process of its own."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvq.bench.floor import taken
from kvq.bench.machine import resident_bytes, versions
from kvq.bench.shapes import Assets, made_folder, make_bundle


class Arm(ABC):
    """One way to run the model; its constructor takes the options that tell arms of one class apart.

    `prepare` runs in a process that is thrown away and may write files next to the bundle; `load` and what follows run
    in the process that is measured. Of `feed` and `step` the time is taken: they do exactly the work a decode loop
    needs, token ids in, logits of the next token out.

    Class attributes ({names} in texts stand for attributes):
        runtime, settings: what runs and how, for people.
        files: name of the folder of files that it reads besides bundle and checkpoint, which `make` makes; or empty.
        packages: modules it needs besides kvq's own dependencies.
        distributions: those whose versions are told.
        any_model: it can run what a GGUF file holds, not only a shape of SmolLM.
        exact: it can run with float32 activations, and is checked so.
        tolerance: largest accepted relative difference of its logits, see `kvq.bench.check`; None reports it only.
        grows: its cache is as large as its tokens are, not as large as its capacity.
        weight_bytes_each, value_bytes_each: resident bytes per weight and per cached value, an upper estimate: arms
            that do not fit into memory together are measured in groups.

    Attributes, set before a method is called:
        assets: the model's files.
        threads: threads it may compute with.
        backend: attention backend of kvq arms; None is their default.
        capacity, length: tokens the cache has room for, and those in it; set before `open`, after `feed` and `step`.
    """

    runtime: ClassVar[str]
    settings: ClassVar[str]
    files: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]] = ()
    any_model: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float | None] = None
    grows: ClassVar[bool] = False
    weight_bytes_each: ClassVar[float] = 1.5
    value_bytes_each: ClassVar[float] = 4.0

    assets: Assets
    threads: int
    backend: str | None
    capacity: int
    length: int

    def make(self, folder: Path) -> None:
        """Write the files of `folder`."""
        raise NotImplementedError

    def made(self) -> None:  # noqa: B027 - that it answers is all
        """Answered as soon as the arm is there; it has imported nothing of its own yet."""

    @abstractmethod
    def load(self) -> None:
        """Load the weights."""

    @abstractmethod
    def open(self) -> None:
        """Start over with an empty cache that has room for `capacity` tokens."""

    @abstractmethod
    def feed(self, ids: np.ndarray) -> None:
        """Feed int64 [tokens] at once, the way this arm does it fastest, until the last logits are there."""

    def step(self, token: int) -> None:
        """Feed one token, until its logits are there."""
        self.feed(np.array([token], np.int64))

    def rest(self, steps: int) -> None:  # noqa: B027 - most arms have nothing to do
        """After each step, outside its time; `steps` since the cache was opened."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """Logits after the last token, float32 [vocab]."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes the cache occupies now, room for later tokens included."""

    def cache_read_bytes(self) -> int:
        """Bytes of the cache that the next step has to read."""
        return self.kv_bytes() if self.grows else self.kv_bytes() * self.length // self.capacity

    def weight_bytes(self) -> int:
        """Bytes of weights that a step has to read."""
        return self.assets.manifest.decode_weight_nbytes

    def policy_seconds(self) -> float | None:
        """What choosing precisions took since the cache was opened; None: nothing chooses."""
        return None

    def describe(self) -> dict[str, Any]:
        """What ran: backend, settings and more; plain JSON values."""
        return {"backend": self.runtime, "settings": self.settings.format(**vars(self))}

    @property
    def folder(self) -> Path:
        """Of the files that `make` makes."""
        return self.assets.folder / (self.files.format(**vars(self)) + "-exact" * self.assets.exact)

    def prepare(self) -> None:
        """Make the files this arm reads, unless they exist."""
        make_bundle(self.assets)
        if self.files and not self.folder.is_dir():
            with made_folder(self.folder) as folder:
                self.make(folder)

    def check(self, prompt: list[int], steps: list[int], out: str) -> None:
        """Write the logits after the prompt and after each step to `out`, float32 [1 + steps, vocab]."""
        self.prefill(prompt, len(steps))
        rows = [self.logits().copy()]
        for token in steps:
            self.steps([token])
            rows.append(self.logits().copy())
        np.save(out, np.stack(rows))

    def prefill(self, ids: list[int], room: int) -> dict[str, Any]:
        """Start over with these tokens and room for more; {"seconds"}."""
        self.capacity, self.length, self._prompt = len(ids) + room, 0, len(ids)
        self.open()
        seconds = taken(self.feed, np.asarray(ids, np.int64))
        self.length = len(ids)
        policy = self.policy_seconds()
        self._shares = {} if policy is None else {"policy_prefill_share": policy / seconds}
        return {"seconds": seconds}

    def steps(self, ids: list[int]) -> dict[str, Any]:
        """Decode steps; {"seconds": of each, "policy_seconds": of each, or none}."""
        seconds, policy = [], []
        for token in ids:
            before = self.policy_seconds()
            seconds.append(taken(self.step, token))
            if before is not None:
                policy.append((self.policy_seconds() or 0.0) - before)
            self.length += 1
            self.rest(self.length - self._prompt)
        return {"seconds": seconds, "policy_seconds": policy}

    def report(self) -> dict[str, Any]:
        """Bytes and description."""
        numbers = ("kv_bytes", "cache_read_bytes", "weight_bytes")
        report = {name: getattr(self, name)() for name in numbers} | {"peak_rss_bytes": resident_bytes(peak=True)}
        return report | {"versions": versions(*self.distributions), **self.describe(), **self._shares}

    def missing(self, assets: Assets) -> str | None:
        """Why the arm cannot run this model here, or None."""
        if assets.source and not self.any_model:
            return "it takes the shapes, not a file"
        absent = [name for name in self.packages if not installed(name)]
        return f"not installed: {', '.join(absent)}" if absent else None

    def resident_bytes(self, assets: Assets, context: int) -> int:
        """Upper estimate of the process's memory with that many tokens cached."""
        values = assets.values_per_token * context * self.value_bytes_each
        return int(assets.parameters * self.weight_bytes_each + values + 400e6)


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it is in
        return False


@cache
def arms() -> dict[str, Arm]:
    """All arms by name: the dicts ``ARMS`` of the modules of `kvq.bench.kvq` and `kvq.bench.peers`.

    kvq first; the first arm of a run is the one that groups are compared by.
    """
    import kvq.bench.kvq
    import kvq.bench.peers
    from kvq.runtime.discovery import discover

    return discover(kvq.bench.kvq, "ARMS") | discover(kvq.bench.peers, "ARMS")


def arm(name: str, assets: dict[str, Any], threads: int, backend: str | None) -> Arm:
    """An arm ready to be asked: name, fields of its `Assets`, attributes as in `Arm`."""
    made = arms()[name]
    made.assets, made.threads, made.backend = Assets(**assets | {"folder": Path(assets["folder"])}), threads, backend
    return made
