"""The interface of an arm: one way to run the model, in a process of its own."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvq.bench.shapes import Assets


@dataclass(frozen=True)
class Setup:
    """What every arm is given.

    Attributes:
        assets: the model's files.
        threads: threads it may compute with.
        backend: attention backend of kvq arms; None is their default.
    """

    assets: Assets
    threads: int
    backend: str | None = None


class Arm(ABC):
    """One way to run the model.

    `prepare` runs once in a process that is thrown away and may write files next to the bundle;
    `load` and what follows run in the process that is measured. Times are in seconds and are taken
    around exactly the work a decode loop needs: token id in, logits of the next token out.

    Class attributes:
        packages: modules it needs besides kvq's own dependencies.
        exact: it can run with float32 activations, and is checked so.
        tolerance: largest accepted relative difference of its logits, see `kvq.bench.check`; None reports it only.
        weight_bytes_each, value_bytes_each: resident bytes per weight and per cached value, an upper
            estimate: arms that do not fit into memory together are measured in groups.

    Attributes:
        policy_seconds: what choosing precisions took of each step since the cache was opened; None: nothing chooses.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float | None] = None
    weight_bytes_each: ClassVar[float] = 1.5
    value_bytes_each: ClassVar[float] = 4.0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.policy_seconds: list[float] | None = None

    def prepare(self) -> None:  # noqa: B027 - most arms that read the bundle need nothing more
        """Make the files this arm reads, unless they exist."""

    @abstractmethod
    def load(self) -> None:
        """Load the weights."""

    @abstractmethod
    def open(self, capacity: int) -> None:
        """Start over with an empty cache that has room for `capacity` tokens."""

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> float:
        """Feed int64 [tokens] at once, the way this arm does it fastest; seconds until the last logits are there."""

    @abstractmethod
    def step(self, token: int) -> float:
        """Feed one token; seconds until its logits are there."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """Logits after the last token, float32 [vocab]."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes the cache occupies now, room for later tokens included."""

    @abstractmethod
    def cache_read_bytes(self) -> int:
        """Bytes of the cache that the next step has to read."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights that a step has to read."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What ran: backend, versions, settings; plain JSON values."""


@dataclass(frozen=True)
class ArmSpec:
    """An arm under its name: a class and its options."""

    kind: type[Arm]
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, setup: Setup) -> Arm:
        """The arm, nothing loaded yet."""
        return self.kind(setup, **self.options)

    def missing(self) -> str | None:
        """Why the arm cannot run here, or None."""
        absent = [name for name in self.kind.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def resident_bytes(self, assets: Assets, context: int) -> int:
        """Upper estimate of the process's memory with that many tokens cached."""
        values = assets.values_per_token * context * self.kind.value_bytes_each
        return int(assets.parameters * self.kind.weight_bytes_each + values + 400e6)


def package_version(*names: str) -> dict[str, str]:
    """Installed versions of distributions: {name: version}; those not found are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def file_bytes(*files: Path) -> int:
    """Size of some files together."""
    return sum(file.stat().st_size for file in files)
