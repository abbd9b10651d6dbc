"""One precision for every token: the baselines a learned policy has to beat."""

from __future__ import annotations

from functools import partial

import numpy as np

from kvq.runtime.policy.base import Policy, TokenFeatures
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Pair, named

# A new codec is a choice of its own at once.
PRECISIONS = sorted(CODECS, key=lambda id_: (-CODECS[id_].bits, CODECS[id_].precision.name))


class StaticPolicy(Policy):
    """Every token gets the same pair of precisions, given by id."""

    reads = frozenset()

    def __init__(self, name: str, k: int, v: int) -> None:
        self.name = name
        self.pair = np.array([k, v], np.uint8)
        self.classes = self.pair[None]

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return np.broadcast_to(self.pair, (len(features.positions), 2))


# Keys need more bits than values at equal quality, so every pair can be asked for: k8v4, k4v2, ...
POLICIES = {str(Pair(k, v)): partial(StaticPolicy, str(Pair(k, v)), k, v) for k in PRECISIONS for v in PRECISIONS}
EQUAL = {"fp16": "16", "int8": "8", "int4": "4", "int3": "3", "int2": "2"}
POLICIES |= {name: partial(StaticPolicy, name, *named(precision)) for name, precision in EQUAL.items()}
