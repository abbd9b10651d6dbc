"""kvq itself, one arm per policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvq
from kvq.bench.arm import Arm
from kvq.bench.kvq.attention import attention_beside_read

POLICIES = ("fp16", "int8", "int4", "int2", "mixed")
SCORED = ("adaptive", "paper", "rule")
KV_BITS = 3.25  # budget of the scored ones, all told
# Sixteen tokens are chosen for at a time. After this step it is chosen early, so that later ones do not all come first
# in a burst of eight, where nothing is in the caches and times are not counted.
PHASE = 4


class PolicyTimer:
    """A `Session.timer`; `seconds` is what everything that serves the choice of precisions took so far."""

    seconds = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun


@dataclass
class KvqArm(Arm):
    """`kvq.load(bundle).session(policy)`, tokens fed by `append`: what an application does.

    The reference of a policy is the same policy on the numpy backend. Sums in another order move a code of a quantized
    cache here and there; a wrong result differs by far more than the tolerance.
    """

    policy: str

    distributions = ("kvq", "onnxruntime", "numpy")
    any_model = True
    exact = True
    tolerance = 0.01
    value_bytes_each = 2.5

    def load(self) -> None:
        self.model = kvq.load(self.assets.bundle, threads=self.threads)

    def open(self) -> None:
        self.session = self.model.session(self.policy, backend=self.backend)

    def feed(self, ids: np.ndarray) -> None:
        self._logits = self.session.append(ids)

    def step(self, token: int) -> None:
        self._logits = self.session.append([token])

    def logits(self) -> np.ndarray:
        return self._logits

    def kv_bytes(self) -> int:
        return self.session.stats().kv_nbytes

    def cache_read_bytes(self) -> int:
        return self.session.store.used_nbytes

    def describe(self) -> dict[str, Any]:
        stats = self.session.stats()
        return {
            "backend": stats.backend,
            "settings": f"policy {stats.policy}, newest {stats.recent} tokens at 16 bits, {stats.prefill} prefill",
            "kv_bits": stats.kv_bits,
            **attention_beside_read(self.session, self.threads),
        }


class KvqScoredArm(KvqArm):
    """A policy that scores its classes, under a budget of `KV_BITS`; what it takes is a part of every step.

    Its time is measured inside the timed calls, around everything that serves the choice: features, the graph of
    entropy and confidence where it is needed, controller, budget. Left out is what attention takes to sum squares of
    a row.
    """

    packages = ("torch", "onnx")  # controllers are made with these

    def prepare(self) -> None:
        from kvq.bench.kvq.controllers import add_controllers

        super().prepare()
        if self.policy != "rule":
            add_controllers(self.assets.bundle, self.threads)

    def open(self) -> None:
        # In a check the prompt is read in a chunk. Stepwise, every token reads rounded ones, and 30 layers of random
        # weights make of a code that one sum in another order has moved 2 % of the logits' size.
        prefill = "chunked" if self.assets.exact else "auto"
        self.session = self.model.session(self.policy, prefill=prefill, backend=self.backend, kv_bits=KV_BITS)
        self.session.timer = self._timer = PolicyTimer()

    def rest(self, steps: int) -> None:
        if steps == PHASE:
            self.session.store.settle()

    def policy_seconds(self) -> float:
        return self._timer.seconds

    def describe(self) -> dict[str, Any]:
        self.session.store.settle()
        described = super().describe()
        controller = "" if self.policy == "rule" else ", controller of the real size with untrained weights"
        precisions = self.session.stats().precisions
        return described | {
            "settings": f"{described['settings']}, {KV_BITS:g} bits a value in all{controller}",
            "tokens_by_precision": {pair: row["tokens"] for pair, row in precisions.items() if row["tokens"]},
        }


ARMS = {f"kvq-{policy}": KvqArm(policy) for policy in POLICIES}
ARMS |= {f"kvq-{policy}": KvqScoredArm(policy) for policy in SCORED}
