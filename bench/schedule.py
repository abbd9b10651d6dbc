"""Measuring arms side by side: all loaded and filled, then short bursts of decode steps in turn.

Other programs and the processor's clock change over minutes; arms that take turns see the same
weather. Only one arm works at a time, and that the others are idle is measured.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvq.bench.arms import ARMS
from kvq.bench.check import check_ids, relative_difference, same_top
from kvq.bench.floor import read_bandwidth
from kvq.bench.process import ArmError, ArmProcess
from kvq.bench.shapes import Assets, assets

PREFILL_TOKENS = 10240  # of all counted fillings of an arm's cache together, or of one if that is more
PAUSE = 0.1  # seconds between turns: threads that spin after their work come to rest
SHARE_OF_MEMORY = 0.8  # of what is available, for all arms of a group together

Say = Callable[[str], None]


@dataclass
class Plan:
    """What is measured.

    Attributes:
        shape, arms, contexts (tokens), threads: the grid.
        cache: folder of the made models.
        backend: attention backend of kvq arms; None is their default.
        steps: decode steps per burst; the first of each is not counted, its data has left the caches.
        rounds: counted bursts per arm; one more comes before them and is not counted.
        prefills: most counted fillings of each arm's cache; as many as `PREFILL_TOKENS` allow.
    """

    shape: str
    arms: list[str]
    contexts: list[int]
    threads: int
    cache: Path
    backend: str | None = None
    steps: int = 8
    rounds: int = 8
    prefills: int = 20

    @property
    def assets(self) -> Assets:
        """Files of the shape."""
        return assets(self.shape, self.cache)

    @property
    def room(self) -> int:
        """Tokens decoded after the context."""
        return self.steps * (self.rounds + 1)

    @contextmanager
    def process(self, arm: str, backend: str | None = None, exact: bool = False) -> Iterator[ArmProcess]:
        """A process for one arm; `exact` as in `kvq.bench.shapes.Assets`."""
        job = {"arm": arm, "shape": self.shape, "folder": str(self.assets.folder), "threads": self.threads}
        process = ArmProcess(job | {"backend": backend or self.backend, "exact": exact})
        try:
            yield process
        finally:
            process.close()


@dataclass
class Result:
    """What a run found.

    Attributes:
        rows: one per arm, context and group.
        skipped: arm -> why it was not measured.
        wrong: arms among them whose results were not those of their reference.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Run:
    """One run over a plan's grid.

    Args:
        plan: what to measure.
        say: called with a line of progress.
    """

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan = plan
        self.say = say
        self.result = Result()
        self._references: dict[tuple[str, bool], np.ndarray] = {}
        self._checks: dict[str, dict[str, Any]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="kvq-bench-")
        rng = np.random.default_rng(0)
        longest = max(plan.contexts) + plan.room
        self._ids = rng.integers(0, plan.assets.fields["vocab_size"], longest).tolist()

    def prepare(self) -> None:
        """Find out what can run, make the files, check the results: in processes that end before anything is timed."""
        for arm in self.plan.arms:
            if reason := ARMS[arm].missing():
                self._skip(arm, reason)
                continue
            self.say(f"{arm}: preparing and checking")
            try:
                self._check(arm)
                with self.plan.process(arm) as process:
                    process.ask("prepare")
            except ArmError as error:
                self._skip(arm, str(error))

    def _skip(self, arm: str, reason: str) -> None:
        self.result.skipped[arm] = reason
        self.say(f"{arm}: skipped, {reason}")

    def _arms(self) -> list[str]:
        return [arm for arm in self.plan.arms if arm not in self.result.skipped]

    def measure(self, context: int) -> None:
        """All arms at one context; adds to the result."""
        groups = self._groups(context)
        for number, group in enumerate(groups):
            if len(groups) > 1:
                self.say(f"memory is short: group {number + 1} of {len(groups)}: {', '.join(group)}")
            bandwidth = read_bandwidth(self.plan.threads)
            with ExitStack() as stack:
                processes: dict[str, ArmProcess] = {}
                rows = {}
                for arm in group:
                    try:
                        process = stack.enter_context(self.plan.process(arm))
                        rows[arm] = self._fill(arm, process, context)
                        processes[arm] = process
                    except ArmError as error:
                        self._skip(arm, str(error))
                for arm, taken in self._prefill_seconds(processes, context).items():
                    rows[arm] |= {"prefill_seconds": taken, "prefill_tokens_per_s": context / float(np.median(taken))}
                seconds, policy, idle = self._take_turns(processes, context)
                bandwidth = max(bandwidth, read_bandwidth(self.plan.threads))
                for arm, process in processes.items():
                    try:
                        rows[arm] |= self._row(seconds[arm], policy[arm], process.ask("report"), bandwidth)
                    except ArmError as error:
                        self._skip(arm, str(error))
                        continue
                    rows[arm] |= {"group": number + 1, "groups": len(groups), "idle_cpu_share": idle[arm]}
                    self.result.rows.append(rows[arm])

    def _groups(self, context: int) -> list[list[str]]:
        """Arms that fit into memory together; the first arm is in every group, to compare the groups by."""
        budget = SHARE_OF_MEMORY * available_bytes()
        need = {arm: ARMS[arm].resident_bytes(self.plan.assets, context) for arm in self._arms()}
        groups: list[list[str]] = []
        for arm in need:
            if groups and sum(need[a] for a in groups[-1]) + need[arm] <= budget:
                groups[-1].append(arm)
            else:
                first = next(iter(need))
                groups.append([arm] if arm == first else [first, arm])
        return groups

    def _fill(self, arm: str, process: ArmProcess, context: int) -> dict[str, Any]:
        """Load an arm; the first fields of its row."""
        self.say(f"{arm}: loading")
        process.ask("load")
        return {
            "arm": arm,
            "shape": self.plan.shape,
            "context": context,
            "threads": self.plan.threads,
            **self._checks[arm],
        }

    def _prefill_seconds(self, processes: dict[str, ArmProcess], context: int) -> dict[str, list[float]]:
        """Fill the caches, the arms in turn, several times for all but long contexts; seconds of each turn.

        The first turn is not counted where there are others. An arm that fails is removed from `processes`.
        """
        seconds: dict[str, list[float]] = {arm: [] for arm in processes}
        times = 1 + min(self.plan.prefills, PREFILL_TOKENS // context)
        for turn in range(times):
            for arm in rotated(processes, turn):
                self.say(f"{arm}: filling the cache with {context} tokens" + (f", {turn + 1} of {times}") * (times > 1))
                time.sleep(PAUSE)
                try:
                    taken = processes[arm].ask("prefill", ids=self._ids[:context], room=self.plan.room)["seconds"]
                except ArmError as error:
                    del processes[arm]
                    self._skip(arm, str(error))
                    continue
                seconds[arm].append(taken)
        return {arm: seconds[arm][1:] or seconds[arm] for arm in processes}

    def _check(self, arm: str) -> None:
        """Compare an arm with its reference, see `kvq.bench.check`; keeps what its rows say of it.

        Raises:
            ArmError: it differs by more than its tolerance.
        """
        kind = ARMS[arm].kind
        same = arm if arm.startswith("kvq-") else "kvq-fp16"
        reference = self._reference(same, kind.exact)
        logits = self._logits(arm, None, kind.exact)
        difference, tolerance = relative_difference(logits, reference), kind.tolerance
        name = f"{same} on numpy" + (", float32 activations" if kind.exact else "")
        if tolerance is not None and not difference <= tolerance:
            self.result.wrong.append(arm)
            raise ArmError(
                f"its logits differ from those of {name} by {difference:.3g}, more than {tolerance:g}: a speed would"
                " mean nothing"
            )
        self._checks[arm] = {
            "check_reference": name,
            "check_difference": difference,
            "check_tolerance": tolerance,
            "check_same_top": same_top(logits, reference),
        }

    def _reference(self, arm: str, exact: bool) -> np.ndarray:
        """Logits of a kvq arm on the numpy backend, computed once a run."""
        if (arm, exact) not in self._references:
            try:
                self._references[arm, exact] = self._logits(arm, "numpy", exact)
            except ArmError as error:
                raise ArmError(f"its reference, {arm} on numpy, cannot be had: {error}") from None
        return self._references[arm, exact]

    def _logits(self, arm: str, backend: str | None, exact: bool) -> np.ndarray:
        """Logits of the check's tokens, float32 [rows, vocab]."""
        prompt, steps = check_ids(self.plan.assets.fields["vocab_size"])
        file = Path(self._folder.name) / "logits.npy"
        with self.plan.process(arm, backend, exact) as process:
            process.ask("prepare")
            process.ask("load")
            process.ask("check", prompt=prompt.tolist(), steps=steps.tolist(), out=str(file))
        return np.load(file)

    def _take_turns(
        self, processes: dict[str, ArmProcess], context: int
    ) -> tuple[dict[str, list[list[float]]], dict[str, list[float]], dict[str, float]]:
        """Bursts of decode steps in turn; seconds of the counted steps of each burst, what policies took of them, and
        processor use of each arm while idle.

        An arm that fails is removed from `processes`.
        """
        seconds: dict[str, list[list[float]]] = {arm: [] for arm in processes}
        policy: dict[str, list[float]] = {arm: [] for arm in processes}
        idle_cpu, idle_wall = dict.fromkeys(processes, 0.0), dict.fromkeys(processes, 0.0)
        for turn in range(self.plan.rounds + 1):
            self.say(f"round {turn} of {self.plan.rounds}")
            at = context + turn * self.plan.steps
            ids = self._ids[at : at + self.plan.steps]
            for arm in rotated(processes, turn):
                time.sleep(PAUSE)
                others = {a: p.cpu_seconds() for a, p in processes.items() if a != arm}
                begun = time.perf_counter()
                try:
                    taken = processes[arm].ask("steps", ids=ids)
                except ArmError as error:
                    del processes[arm]
                    self._skip(arm, str(error))
                    continue
                wall = time.perf_counter() - begun
                for other, before in others.items():
                    idle_cpu[other] += processes[other].cpu_seconds() - before
                    idle_wall[other] += wall
                if turn:
                    counted = slice(min(1, len(ids) - 1), None)
                    seconds[arm].append(taken["seconds"][counted])
                    policy[arm] += (taken["policy_seconds"] or [])[counted]
        return seconds, policy, {arm: idle_cpu[arm] / idle_wall[arm] if idle_wall[arm] else 0.0 for arm in processes}

    def _row(
        self, seconds: list[list[float]], policy: list[float], report: dict[str, Any], bandwidth: float
    ) -> dict[str, Any]:
        """What follows from the times of an arm's steps, burst by burst, of its policy in them, and its own report."""
        p25, median, p75 = (1e3 * np.percentile(np.concatenate(seconds), [25, 50, 75])).tolist()
        read = report["weight_bytes"] + report["cache_read_bytes"]
        floor = 1e3 * read / bandwidth
        return {
            "ms_per_token": median,
            "ms_p25": p25,
            "ms_p75": p75,
            "burst_ms": [1e3 * float(np.median(burst)) for burst in seconds],
            "steps": sum(map(len, seconds)),
            "tokens_per_s": 1e3 / median,
            "kv_bytes": report["kv_bytes"],
            "cache_read_bytes": report["cache_read_bytes"],
            "weight_bytes": report["weight_bytes"],
            "peak_rss_bytes": report["peak_rss_bytes"],
            "gb_per_s": read / median / 1e6,
            "bandwidth_gb_per_s": bandwidth / 1e9,
            "floor_ms": floor,
            "over_floor": median / floor,
            **({"policy_ms": 1e3 * float(np.mean(policy))} if policy else {}),
            **report["details"],
        }


def rotated(arms: Iterable[str], turn: int) -> list[str]:
    """The order of a turn: each arm has every place in it once, so that none always has the best."""
    order = list(arms)
    shift = turn % max(1, len(order))
    return order[shift:] + order[:shift]


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
