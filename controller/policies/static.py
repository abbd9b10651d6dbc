"""One precision for every token: the baselines a learned policy has to beat."""

from __future__ import annotations

from functools import partial

import numpy as np

from kvq.runtime.policy.base import Policy, TokenFeatures
from kvq.runtime.precision.codecs import CODECS

WIDTHS = sorted(CODECS, reverse=True)  # a new codec is a choice of its own at once


class StaticPolicy(Policy):
    """Every token gets the same pair of bits."""

    reads = frozenset()

    def __init__(self, name: str, k_bits: int, v_bits: int) -> None:
        self.name = name
        self.bits = np.array([k_bits, v_bits], np.uint8)
        self.classes = self.bits[None]

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return np.broadcast_to(self.bits, (len(features.positions), 2))


# Keys need more bits than values at equal quality, so every pair can be asked for: k8v4, k4v2, ...
POLICIES = {f"k{k}v{v}": partial(StaticPolicy, f"k{k}v{v}", k, v) for k in WIDTHS for v in WIDTHS}
POLICIES |= {
    name: partial(StaticPolicy, name, b, b) for name, b in (("fp16", 16), ("int8", 8), ("int4", 4), ("int2", 2))
}
