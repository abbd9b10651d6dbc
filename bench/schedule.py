"""Measuring arms side by side: all loaded and filled, then short bursts of decode steps in turn.

Other programs and the processor's clock change over minutes; arms that take turns see the same weather. Only one arm
works at a time, and that the others are idle is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvq.bench.arm import arms
from kvq.bench.check import check_ids, relative_difference, same_top
from kvq.bench.floor import read_bandwidth
from kvq.bench.machine import available_bytes
from kvq.bench.process import Child, ChildError
from kvq.bench.report.tables import Row, quarters
from kvq.bench.shapes import assets

PREFILL_TOKENS = 10240  # of all counted fillings of an arm's cache together, or of one if that is more
PAUSE = 0.1  # seconds before each turn: threads that spin after their work come to rest
SHARE_OF_MEMORY = 0.8  # of what is available, for all arms of a group together


def in_turn(names: Iterable[str], turn: int, out: Container[str] = ()) -> Iterator[str]:
    """The order of a turn, with a pause before each: every name has every place in it once, so none always has the
    best. Names that are in `out` when it is theirs are passed over.
    """
    order = list(names)
    shift = turn % max(1, len(order))
    for name in order[shift:] + order[:shift]:
        if name not in out:
            time.sleep(PAUSE)
            yield name


@dataclass
class Run:
    """One run over a grid of arms and contexts.

    Attributes:
        shape, arms, contexts (tokens), threads: the grid; a shape may be a GGUF file.
        cache: folder of the made models.
        backend: attention backend of kvq arms; None is their default.
        steps: decode steps per burst; the first of each is not counted, its data has left the caches.
        rounds: counted bursts per arm; one more comes before them and is not counted.
        prefills: most counted fillings of each arm's cache; as many as `PREFILL_TOKENS` allow.
        say: called with a line of progress.
        rows: one per arm, context and group.
        skipped: arm -> why it was not measured.
        wrong: arms among them whose results were not those of their reference.
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
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.assets = assets(self.shape, self.cache)
        self._references: dict[tuple[str, bool], np.ndarray] = {}
        self._checks: dict[str, Row] = {}
        self._vocab = self.assets.fields["vocab_size"]
        self._room = self.steps * (self.rounds + 1)
        self._ids = np.random.default_rng(0).integers(0, self._vocab, max(self.contexts) + self._room).tolist()

    def child(self, arm: str, backend: str | None = None, exact: bool = False) -> Child:
        """A process for one arm; `exact` as in `kvq.bench.shapes.Assets`."""
        made = vars(replace(self.assets, exact=exact)) | {"folder": str(self.assets.folder)}
        job = {"name": arm, "assets": made, "threads": self.threads, "backend": backend or self.backend}
        return Child("kvq.bench.arm:arm", job, self.threads)

    @contextmanager
    def _skipping(self, arm: str) -> Iterator[None]:
        """An arm that fails in this block is named as skipped."""
        try:
            yield
        except ChildError as error:
            self._skip(arm, str(error))

    def _skip(self, arm: str, reason: str) -> None:
        self.skipped[arm] = reason
        self.say(f"{arm}: skipped, {reason}")

    def prepare(self) -> None:
        """Find out what can run, make the files, check the results: in processes that end before anything is timed."""
        for arm in self.arms:
            if reason := arms()[arm].missing(self.assets):
                self._skip(arm, reason)
                continue
            self.say(f"{arm}: preparing and checking")
            with self._skipping(arm):
                self._check(arm)
                with self.child(arm) as child:
                    child.ask("prepare")

    def _check(self, arm: str) -> None:
        """Compare an arm with its reference, see `kvq.bench.check`; keeps what its rows say of it.

        Raises:
            ChildError: it differs by more than its tolerance.
        """
        kind = arms()[arm]
        same = arm if arm.startswith("kvq-") else "kvq-fp16"
        name = f"{same} on numpy" + (", float32 activations" if kind.exact else "")
        if (same, kind.exact) not in self._references:
            try:
                self._references[same, kind.exact] = self._logits(same, "numpy", kind.exact)
            except ChildError as error:
                raise ChildError(f"its reference, {same} on numpy, cannot be had: {error}") from None
        reference, logits = self._references[same, kind.exact], self._logits(arm, None, kind.exact)
        difference, tolerance = relative_difference(logits, reference), kind.tolerance
        if tolerance is not None and not difference <= tolerance:
            self.wrong.append(arm)
            far = f"by {difference:.3g}, more than {tolerance:g}"
            raise ChildError(f"its logits differ from those of {name} {far}: a speed would mean nothing")
        self._checks[arm] = {
            "check_reference": name,
            "check_difference": difference,
            "check_tolerance": tolerance,
            "check_same_top": same_top(logits, reference),
        }

    def _logits(self, arm: str, backend: str | None, exact: bool) -> np.ndarray:
        """Logits of the check's tokens, float32 [rows, vocab]."""
        prompt, steps = check_ids(self._vocab)
        with self.child(arm, backend, exact) as child:  # for itself: files are made with other numbers of threads
            child.ask("prepare")
        with tempfile.TemporaryDirectory(prefix="kvq-bench-") as folder, self.child(arm, backend, exact) as child:
            child.ask("load")
            child.ask("check", prompt=prompt.tolist(), steps=steps.tolist(), out=f"{folder}/logits.npy")
            return np.load(f"{folder}/logits.npy")

    def measure(self, context: int) -> None:
        """All arms at one context; adds to the rows."""
        groups = self._groups(context)
        for number, group in enumerate(groups, 1):
            if len(groups) > 1:
                self.say(f"memory is short: group {number} of {len(groups)}: {', '.join(group)}")
            with ExitStack() as stack:
                self._measure_group(stack, group, context, {"group": number, "groups": len(groups)})

    def _groups(self, context: int) -> list[list[str]]:
        """Arms that fit into memory together; the first arm is in every group, to compare the groups by."""
        budget, made = SHARE_OF_MEMORY * available_bytes(), self.assets
        need = {a: arms()[a].resident_bytes(made, context) for a in self.arms if a not in self.skipped}
        groups: list[list[str]] = []
        for arm in need:
            if groups and sum(need[a] for a in groups[-1]) + need[arm] <= budget:
                groups[-1].append(arm)
            else:
                groups.append(list(dict.fromkeys([next(iter(need)), arm])))
        return groups

    def _measure_group(self, stack: ExitStack, group: list[str], context: int, about: Row) -> None:
        """Arms that are loaded together; their processes end with the stack."""
        bandwidth = read_bandwidth(self.threads)
        children: dict[str, Child] = {}
        for arm in group:
            with self._skipping(arm):
                self.say(f"{arm}: loading")
                child = stack.enter_context(self.child(arm))
                child.ask("load")
                children[arm] = child
        prefill = self._prefill(children, context)
        steps, idle = self._decode(children, context)
        about |= {"shape": Path(self.shape).name, "context": context, "threads": self.threads}
        bandwidth = max(bandwidth, read_bandwidth(self.threads))
        for arm, child in children.items():
            if arm in self.skipped:
                continue
            with self._skipping(arm):
                report = child.ask("report")
                speed = {"prefill_tokens_per_s": context / float(np.median(prefill[arm])), "idle_cpu_share": idle[arm]}
                row = {"arm": arm, **about, **self._checks[arm], "prefill_seconds": prefill[arm], **speed}
                self.rows.append(row | report | step_figures(steps[arm], report, bandwidth))

    def _prefill(self, children: dict[str, Child], context: int) -> dict[str, list[float]]:
        """Fill the caches, the arms in turn, several times for all but long contexts; seconds of each turn.

        The first turn is not counted where there are others.
        """
        seconds: dict[str, list[float]] = {arm: [] for arm in children}
        times = 1 + min(self.prefills, PREFILL_TOKENS // context)
        for turn in range(times):
            for arm in in_turn(children, turn, self.skipped):
                self.say(f"{arm}: filling the cache with {context} tokens" + (f", {turn + 1} of {times}") * (times > 1))
                with self._skipping(arm):
                    answer = children[arm].ask("prefill", ids=self._ids[:context], room=self._room)
                    seconds[arm].append(answer["seconds"])
        return {arm: taken[1:] or taken for arm, taken in seconds.items()}

    def _decode(
        self, children: dict[str, Child], context: int
    ) -> tuple[dict[str, list[dict[str, list[float]]]], dict[str, float]]:
        """Bursts of decode steps in turn.

        Returns:
            of each arm the answers to its counted bursts, without uncounted steps, and its use of the processor while
            idle, in cores.
        """
        bursts: dict[str, list[dict[str, list[float]]]] = {arm: [] for arm in children}
        cpu, wall = dict.fromkeys(children, 0.0), dict.fromkeys(children, 0.0)
        counted = slice(min(1, self.steps - 1), None)
        for turn in range(self.rounds + 1):
            self.say(f"round {turn} of {self.rounds}")
            at = context + turn * self.steps
            for arm in in_turn(children, turn, self.skipped):
                others = {a: child.cpu_seconds() for a, child in children.items() if a not in (arm, *self.skipped)}
                begun = time.perf_counter()
                with self._skipping(arm):
                    answer = children[arm].ask("steps", ids=self._ids[at : at + self.steps])
                    passed = time.perf_counter() - begun
                    for other, before in others.items():
                        cpu[other] += children[other].cpu_seconds() - before
                        wall[other] += passed
                    if turn:
                        bursts[arm].append({name: values[counted] for name, values in answer.items()})
        return bursts, {arm: cpu[arm] / wall[arm] if wall[arm] else 0.0 for arm in children}


def step_figures(bursts: list[dict[str, list[float]]], report: Row, bandwidth: float) -> dict[str, Any]:
    """What follows from the times of an arm's steps, burst by burst, of its policy in them, and its own report.

    Args:
        bandwidth: of memory, bytes a second.
    """
    policy = [seconds for burst in bursts for seconds in burst["policy_seconds"]]
    p25, median, p75 = quarters([1e3 * seconds for burst in bursts for seconds in burst["seconds"]])
    read = report["weight_bytes"] + report["cache_read_bytes"]
    floor = 1e3 * read / bandwidth
    return {
        "ms_per_token": median,
        "ms_p25": p25,
        "ms_p75": p75,
        "burst_ms": [1e3 * float(np.median(burst["seconds"])) for burst in bursts],
        "steps": sum(len(burst["seconds"]) for burst in bursts),
        "tokens_per_s": 1e3 / median,
        "gb_per_s": read / median / 1e6,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "floor_ms": floor,
        "over_floor": median / floor,
        **({"policy_ms": 1e3 * float(np.mean(policy))} if policy else {}),
    }
