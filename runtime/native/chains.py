"""Chains of steps between the attention of two layers, as the native library reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from kvq.runtime.native.library import Chain, Step

PRODUCT, ADD_NORM, SWIGLU = range(3)  # KVQ_STEP_...


class ChainStep(NamedTuple):
    """A step: its kind; the address of a product's packed matrix; blocks that are rotated, or 0; epsilon of a norm."""

    kind: int
    matrix: int = 0
    block: int = 0
    epsilon: float = 0.0


class StepChain:
    """Steps in the library's form.

    Args:
        steps: in order, the first a product; their matrices have to live as long as this.
        kernel: index of the instruction set that the matrices are packed for.
        threads: that share the work.

    Attributes:
        address: of the kvq_chain, for as long as this object lives.
    """

    def __init__(self, steps: Sequence[ChainStep], kernel: int, threads: int) -> None:
        described = (Step(step.matrix or None, step.kind, step.block, step.epsilon) for step in steps)
        self._steps = (Step * len(steps))(*described)
        self._chain = Chain(ctypes.addressof(self._steps), len(steps), kernel, threads)
        self.address = ctypes.addressof(self._chain)
