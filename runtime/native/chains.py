"""Chains of steps that follow one another, as the native library reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from kvq.runtime.native.library import Chain, Step

PRODUCT, ADD_NORM, SWIGLU, ATTENTION = range(4)  # KVQ_STEP_...


class ChainStep(NamedTuple):
    """What a chain does next with its rows.

    Attributes:
        kind: of the step.
        matrix: address of a product's packed matrix.
        block: of norms and activations, what is rotated of a row at a time, or 0.
        epsilon: of a norm.
        layer, rotate: of attention, its operator's attributes.
        inputs: of attention, how many its operator takes behind the projections.
    """

    kind: int
    matrix: int = 0
    block: int = 0
    epsilon: float = 0.0
    layer: int = 0
    rotate: int = 0
    inputs: int = 0


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
        described = (Step(step.matrix or None, step.kind, *step[2:]) for step in steps)
        self._steps = (Step * len(steps))(*described)
        self._chain = Chain(ctypes.addressof(self._steps), len(steps), kernel, threads)
        self.address = ctypes.addressof(self._chain)
