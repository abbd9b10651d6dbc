"""kvq itself, one arm per policy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvq.bench.arms.base import Arm, ArmSpec, Setup, package_version
from kvq.bench.attention import attention_beside_read

POLICIES = ("fp16", "int8", "int4", "int2", "mixed")


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
            "versions": package_version("kvq", "onnxruntime", "numpy"),
            "settings": f"policy {stats.policy}, newest {stats.recent} tokens at 16 bits",
            "kv_bits": stats.kv_bits,
            **attention_beside_read(self.session, self.setup.threads),
        }


ARMS = {f"kvq-{policy}": ArmSpec(KvqArm, {"policy": policy}) for policy in POLICIES}
