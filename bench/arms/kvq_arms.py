"""kvq itself, one arm per policy."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import kvq
from kvq.bench.arms.base import Arm, ArmSpec, Setup, package_version
from kvq.bench.attention import attention_beside_read

POLICIES = ("fp16", "int8", "int4", "int2", "mixed")
SCORED = ("adaptive", "paper", "rule")
KV_BITS = 3.25  # budget of the scored ones, all told
# Sixteen tokens are chosen for at a time. This step chooses early, so that later ones do not all come first in a burst
# of eight, where nothing is in the caches and times are not counted.
PHASE = 4


class KvqArm(Arm):
    """`kvq.load(bundle).session(policy)`, tokens fed by `append`: what an application does.

    The reference of a policy is the same policy on the numpy backend. Sums in another order move a
    code of a quantized cache here and there; a wrong result differs by far more than the tolerance.
    """

    exact = True
    tolerance = 0.01
    value_bytes_each = 2.5

    def __init__(self, setup: Setup, policy: str) -> None:
        super().__init__(setup)
        self.policy = policy

    def load(self) -> None:
        import kvq

        self.model = kvq.load(self.setup.assets.bundle, threads=self.setup.threads)

    def open(self, capacity: int) -> None:
        self.session = self.model.session(self.policy, backend=self.setup.backend)

    def prefill(self, ids: np.ndarray) -> float:
        begun = time.perf_counter()
        self._logits = self.session.append(ids)
        return time.perf_counter() - begun

    def step(self, token: int) -> float:
        begun = time.perf_counter()
        self._logits = self.session.append([token])
        return time.perf_counter() - begun

    def logits(self) -> np.ndarray:
        return self._logits

    def kv_bytes(self) -> int:
        return self.session.stats().kv_nbytes

    def cache_read_bytes(self) -> int:
        return self.session.store.used_nbytes

    def weight_bytes(self) -> int:
        return self.model.bundle.manifest.decode_weight_nbytes

    def describe(self) -> dict[str, Any]:
        stats = self.session.stats()
        return {
            "backend": stats.backend,
            "versions": {"kvq": kvq.__version__} | package_version("onnxruntime", "numpy"),
            "settings": f"policy {stats.policy}, newest {stats.recent} tokens at 16 bits, {stats.prefill} prefill",
            "kv_bits": stats.kv_bits,
            **attention_beside_read(self.session, self.setup.threads),
        }


class KvqScoredArm(KvqArm):
    """A policy that scores its classes, under a budget of `KV_BITS`; what it takes is a part of every step.

    Its time is measured inside the timed calls, around everything that serves the choice: features, the graph of
    entropy and confidence where it is needed, controller, budget. Left out is what attention takes to sum squares of
    a row.
    """

    packages = ("torch", "onnx")  # controllers are made with these

    def prepare(self) -> None:
        from kvq.bench.controllers import add_controllers

        if self.policy != "rule":
            add_controllers(self.setup.assets.bundle, self.setup.threads)

    def open(self, capacity: int) -> None:
        vars(self).pop("session", None)
        gc.collect()  # the calls timed below refer to their session and it to them
        # In a check the prompt is read in a chunk. Stepwise, every token reads rounded ones, and 30 layers of random
        # weights make of a code that one sum in another order has moved 2 % of the logits' size.
        prefill = "chunked" if self.setup.assets.exact else "auto"
        self.session = session = self.model.session(
            self.policy, prefill=prefill, backend=self.setup.backend, kv_bits=KV_BITS
        )
        self._policy = 0.0
        self._taken: list[float] = []
        self.policy_seconds = self._taken
        session.timer = self._timed

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Adds the time of the part to the policy's."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._policy += time.perf_counter() - begun

    def prefill(self, ids: np.ndarray) -> float:
        seconds = super().prefill(ids)
        self._prefill_share = self._policy / seconds
        return seconds

    def step(self, token: int) -> float:
        self._policy = 0.0
        seconds = super().step(token)
        self._taken.append(self._policy)
        if len(self._taken) == PHASE:
            self.session.store.settle()
        return seconds

    def describe(self) -> dict[str, Any]:
        self.session.store.settle()
        described = super().describe()
        held = {pair: row["tokens"] for pair, row in self.session.stats().precisions.items() if row["tokens"]}
        controller = "" if self.policy == "rule" else ", controller of the real size with untrained weights"
        return described | {
            "settings": f"{described['settings']}, {KV_BITS:g} bits a value in all{controller}",
            "policy_prefill_share": self._prefill_share,
            "tokens_by_precision": held,
        }


ARMS = {f"kvq-{policy}": ArmSpec(KvqArm, {"policy": policy}) for policy in POLICIES}
ARMS |= {f"kvq-{policy}": ArmSpec(KvqScoredArm, {"policy": policy}) for policy in SCORED}
