"""A batch over the nodes of a Ray cluster: a worker a node, and what a lost one had at work goes to another.

The only module that knows ray. Its processes hand each other pickled objects: a cluster is one machine to whoever
reaches it, as Ray says of its own.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from kvq.runtime.errors import BatchError, KvqError
from kvq.runtime.extras import install, missing
from kvq.runtime.server.batch import Answer, Answerer, Asked, Options
from kvq.runtime.version import VERSION

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model

LOSSES = 3  # workers that a node may lose without an answer in between
LOOK_S = 5.0  # how often the cluster's nodes are looked at
REACH_S = 10.0  # until a cluster's address answers
WAIT_S = 0.5  # how long a call is waited for at a time
PATIENCE_S = 30.0  # of waiting for a first worker, before it is said what for


class Opened(NamedTuple):
    """What a worker that is ready says of itself.

    version: of its kvq.
    digest, served: as in `Answering`.
    most: requests it can have at work.
    """

    version: str
    digest: str
    served: str
    most: int


class Worker:
    """What runs on a node: the answerer of a batch, one call at a time."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._answerer: Answerer | None = None

    def open(self, load: Callable[[], Model], options: Options) -> Opened | str:
        """Load the model; why it cannot be, where it cannot."""
        try:
            self._answerer = Answerer(load(), options, self._notes.append, self._notes.append)
        except KvqError as error:
            return str(error)
        return Opened(VERSION, self._answerer.digest, self._answerer.served, self._answerer.most)

    def step(self, lines: Sequence[Asked]) -> tuple[list[Answer], list[str]]:
        """As `Answerer.step`; and what there is to be told."""
        if self._answerer is None:
            raise RuntimeError("step before open")
        found = self._answerer.step(lines)
        told = self._notes[:]
        del self._notes[: len(told)]
        return found, told


@dataclass(eq=False)
class _Node:
    """A node that answers.

    Attributes:
        address: its host, for messages.
        cpus: that the cluster has of it.
        actor: its worker; None where it has none.
        call: what the worker does now.
        most: requests it can have at work; 0 until it is ready.
        at_work: by custom_id.
        losses: workers lost since the last answer.
    """

    address: str
    cpus: float
    actor: Any = None
    call: Any = None
    most: int = 0
    at_work: dict[str, Asked] = field(default_factory=dict)
    losses: int = 0


class Cluster:
    """Answers requests on all nodes of a cluster that have CPUs; those that join later too. Close it after use.

    Args:
        address: of the cluster, as `ray.init` takes it; "auto" is the one this machine is in.
        load: makes the model, on a node.
        options: what answers depend on beside it.
        threads: CPUs that a worker asks the cluster for; None is all of its node.
        log: told what goes wrong with nodes, and unexpected errors.
        notice: told in one line what sessions want their user to know.

    Attributes:
        digest, served: as in `Answering`, of the first node that is ready; the others must have the same.

    Raises:
        BatchError: ray is not installed, there is no such cluster, or no node can answer.
    """

    def __init__(
        self,
        address: str,
        load: Callable[[], Model],
        options: Options,
        threads: int | None,
        log: Callable[[str], None],
        notice: Callable[[str], None],
    ) -> None:
        self._load, self._options, self._threads = load, options, threads
        self._log, self._notice = log, notice
        self._ray = _connected(address)
        self._nodes: dict[str, _Node] = {}
        self._looked = float("-inf")
        self._why = ""  # the last node was lost or left out
        self.digest = self.served = ""
        try:
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    def _wait_for_one(self) -> None:
        begun, told = time.monotonic(), False
        while not self.digest:
            self._look()
            self._next()
            if not told and time.monotonic() > begun + PATIENCE_S:
                told = True
                self._log("waiting for a node with free CPUs, or for the model to be loaded there")

    def close(self) -> None:
        """End the workers, and leave the cluster."""
        for node in self._nodes.values():
            self._end(node)
        self._ray.shutdown()

    def answers(self, lines: Iterable[Asked]) -> Iterator[Answer]:
        """As in `Answering`."""
        left, again = iter(lines), deque[Asked]()
        while True:
            self._look()
            for node in self._nodes.values():
                if node.call is None and node.most:
                    room = node.most - len(node.at_work)
                    new = [again.popleft() for _ in range(min(room, len(again)))]
                    new += islice(left, room - len(new))
                    self._give(node, new)
            if not any(node.at_work for node in self._nodes.values()) and not again:
                return
            found, lost = self._next()
            yield from found
            again.extend(lost)

    def _give(self, node: _Node, new: Sequence[Asked]) -> None:
        node.at_work |= {asked.values["custom_id"]: asked for asked in new}
        if node.at_work:
            node.call = node.actor.step.remote([*new])

    def _look(self) -> None:
        """Begin a worker on every node that has none, at most once in `LOOK_S`."""
        if time.monotonic() < self._looked + LOOK_S:
            return
        self._looked = time.monotonic()
        alive = {each["NodeID"]: each for each in self._ray.nodes() if each["Alive"]}
        for name, each in alive.items():
            cpus = each["Resources"].get("CPU", 0.0)
            if cpus and name not in self._nodes:
                self._nodes[name] = _Node(each["NodeManagerAddress"], cpus)
        for name in [name for name, node in self._nodes.items() if name not in alive and node.actor is None]:
            del self._nodes[name]
        for name, node in self._nodes.items():
            if node.actor is None and node.losses < LOSSES:
                self._begin(name, node)
        if all(node.actor is None for node in self._nodes.values()):
            raise BatchError(f"no node of the cluster can answer{self._why or ': none has a CPU'}")

    def _begin(self, name: str, node: _Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node.actor = self._ray.remote(Worker).options(
            num_cpus=min(node.cpus, self._threads or node.cpus), max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
        ).remote()  # fmt: skip
        node.call = node.actor.open.remote(self._load, self._options)

    def _next(self) -> tuple[list[Answer], list[Asked]]:
        """Answers of a node that has some, and lines that one has lost; none of both, after a while."""
        calls = {node.call: node for node in self._nodes.values() if node.call is not None}
        if not calls:
            time.sleep(WAIT_S)  # until nodes are looked at again
            return [], []
        ready, _ = self._ray.wait([*calls], timeout=WAIT_S)
        found: list[Answer] = []
        lost: list[Asked] = []
        for call in ready:
            node = calls[call]
            node.call = None
            try:
                told = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                lost += self._lost(node, error)
                continue
            if node.most:
                found += self._heard(node, *told)
            else:
                self._opened(node, told)
        return found, lost

    def _heard(self, node: _Node, found: list[Answer], notes: list[str]) -> list[Answer]:
        for note in notes:
            self._notice(f"{node.address}: {note}")
        for answer in found:
            del node.at_work[answer.asked.values["custom_id"]]
        node.losses = 0
        return found

    def _opened(self, node: _Node, told: Opened | str) -> None:
        """A worker is ready, or is not to be used."""
        if isinstance(told, str):
            why = told
        elif told.version != VERSION:
            why = f"it has kvq {told.version}, this is {VERSION}; install the same on both"
        elif self.digest and told.digest != self.digest:
            why = "its model of that name is another one; give all nodes the same"
        else:
            self.digest, self.served, node.most = told.digest, told.served, told.most
            return
        self._end(node)
        node.losses = LOSSES
        self._leave_out(node, why)

    def _lost(self, node: _Node, error: Exception) -> list[Asked]:
        """A worker is gone; what it had at work."""
        lines = [*node.at_work.values()]
        node.losses += 1
        self._end(node)
        cause = getattr(error, "cause", None) or error
        why = " ".join(str(cause).split())[:200] or type(cause).__name__
        if node.losses < LOSSES:
            self._log(f"the worker on {node.address} is lost, {len(lines)} requests go to another ({why})")
        else:
            self._leave_out(node, f"its worker was lost {LOSSES} times without an answer ({why})")
        return lines

    def _leave_out(self, node: _Node, why: str) -> None:
        self._why = f": {node.address}: {why}"
        self._log(f"{node.address} is left out: {why}")

    def _end(self, node: _Node) -> None:
        if node.actor is not None:
            self._ray.kill(node.actor)
        node.actor, node.call, node.most, node.at_work = None, None, 0, {}


def _connected(address: str) -> Any:
    """The module ray, once it is connected."""
    if missing("ray"):
        raise BatchError(f"a batch on a cluster needs ray: {install('ray')}")
    import ray

    if address.strip().lower() == "local":  # to ray a cluster made here, open to the network, which outlives us
        raise BatchError("a batch on this machine alone needs no cluster; leave --ray out")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdigit():  # ray itself tries for many minutes
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        ray.init(address, logging_level="ERROR", log_to_driver=False)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise BatchError(
            f"no Ray cluster at {address} ({' '.join(str(error).split())[:120]}); start one with: ray start --head"
            " --disable-usage-stats"
        ) from None
    return ray
