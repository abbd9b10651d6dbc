"""Ways to read the cache of a `ParallelModel` that only tests need. Importing this needs torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvq.controller.training.parallel import Reader, roundtrip

# stored(layer, side, x, precision): `ParallelModel.stored` of the model that reads
Stored = Callable[[int, int, Tensor, int], Tensor]


def plainly(layer: int, side: int, x: Tensor, precision: int) -> Tensor:
    """A `Stored` without a model's feedback and turns."""
    return roundtrip(x, precision)


def hard_reader(bits: np.ndarray | Tensor, stored: Stored = plainly) -> Reader:
    """Every token at its own precision: bits integer [batch, tokens, 2], key and value bits."""
    wanted = torch.as_tensor(np.array(bits, np.int64))

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        for side, x in enumerate((keys, values)):
            y = x.clone()
            for width in wanted[..., side].unique().tolist():
                chosen = (wanted[..., side] == width).to(x.device)
                y = torch.where(chosen[:, None, :, None], stored(layer, side, x, width), y)
            seen.append(y)
        return seen[0], seen[1]

    return read


def mixture_reader(weights: Tensor, classes: list[tuple[int, int]], stored: Stored = plainly) -> Reader:
    """Every token as a weighted mixture of what each class would store.

    Args:
        weights: [batch, tokens, classes], rows sum to one; gradients flow into them.
        classes: (key bits, value bits) of each.
        stored: what is read of keys and values.
    """

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        for side, x in enumerate((keys, values)):
            # x + sum of weight * (stored - x): the identity's share passes x's own gradient on.
            y = x
            for width in sorted({pair[side] for pair in classes}):
                members = [i for i, pair in enumerate(classes) if pair[side] == width]
                share = weights[..., members].sum(-1)[:, None, :, None]
                y = y + share * (stored(layer, side, x.detach(), width) - x.detach())
            seen.append(y)
        return seen[0], seen[1]

    return read
