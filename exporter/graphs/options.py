"""How the graphs of a bundle are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvq.exporter.key_basis import KeyBasis

# MatMulNBits' accuracy_level: 0 keeps activations in float32, 4 quantizes them to int8 on the fly.
ACCURACY_LEVEL = {"fp32": 0, "int8": 4, "int16-head": 4}


@dataclass(frozen=True)
class GraphOptions:
    """How graphs are written.

    Attributes:
        weights: a name of `kvq.exporter.weights.matrices.LAYER_BITS`.
        activations: in products with quantized weights, "int8" (fast), "fp32" (exact), or "int16-head": int8, but
            two bytes a value in front of the head.
        block: elements per scale of a quantized matrix.
        rotation: float32 [head_dim, head_dim] applied to every head of queries, keys and values.
        mean_keys: float32 [layers, kv_heads, head_dim], in the rotated space, subtracted from keys.
        key_basis: of queries and keys, in front of the rotation; None leaves them as they are. Mean keys are of it.
        turns: what a product takes is rotated in blocks, if its matrix is quantized here.
        values: "folded", rotated inside the weights of v, and what attention makes of them turned back inside those
            of o, which costs nothing, but makes new weights of both; "half", rotated as they come, so that v stays on
            the grid that a source holds it on; "online", turned back before o sees them, too.
    """

    weights: str
    activations: str
    block: int
    rotation: np.ndarray
    mean_keys: np.ndarray
    values: str = "folded"
    turns: bool = True
    key_basis: KeyBasis | None = None

    @property
    def rotates(self) -> bool:
        """Whether the rotation is one."""
        return not np.array_equal(self.rotation, np.eye(len(self.rotation)))

    @property
    def folds_values(self) -> bool:
        """Whether values are rotated inside the weights of v."""
        return self.rotates and self.values == "folded"

    @property
    def folds_outputs(self) -> bool:
        """Whether what attention makes of values is turned back inside the weights of o."""
        return self.rotates and self.values != "online"

    @property
    def rotates_values(self) -> bool:
        """Whether values are rotated as they come."""
        return self.rotates and not self.folds_values

    @property
    def turns_back(self) -> bool:
        """Whether what attention makes of values is turned back before o sees it."""
        return self.rotates and not self.folds_outputs
