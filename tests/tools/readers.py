"""Ways to read the cache of a `ParallelModel` that only tests need. Importing this needs torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvq.controller.training.parallel import Reader, roundtrip


def hard_reader(bits: np.ndarray | Tensor, feedback: np.ndarray | None = None) -> Reader:
    """Every token at its own precision: bits integer [batch, tokens, 2], key and value bits; feedback: of the keys."""
    wanted = torch.as_tensor(np.array(bits, np.int64))

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        for side, x in enumerate((keys, values)):
            y = x.clone()
            for width in wanted[..., side].unique().tolist():
                chosen = (wanted[..., side] == width).to(x.device)
                fed = None if side or feedback is None else feedback[layer]
                y = torch.where(chosen[:, None, :, None], roundtrip(x, width, fed), y)
            seen.append(y)
        return seen[0], seen[1]

    return read


def mixture_reader(weights: Tensor, classes: list[tuple[int, int]], feedback: np.ndarray | None = None) -> Reader:
    """Every token as a weighted mixture of what each class would store.

    Args:
        weights: [batch, tokens, classes], rows sum to one; gradients flow into them.
        classes: (key bits, value bits) of each.
        feedback: of the keys.
    """

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        for side, x in enumerate((keys, values)):
            # x + sum of weight * (stored - x): the identity's share passes x's own gradient on.
            y = x
            for width in sorted({pair[side] for pair in classes}):
                members = [i for i, pair in enumerate(classes) if pair[side] == width]
                share = weights[..., members].sum(-1)[:, None, :, None]
                fed = None if side or feedback is None else feedback[layer]
                y = y + share * (roundtrip(x.detach(), width, fed) - x.detach())
            seen.append(y)
        return seen[0], seen[1]

    return read
