"""The way of new tokens through the recent window: what each drives out of it, and where that goes."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvq.runtime.kv.pages import Page
from kvq.runtime.kv.window import RecentWindow

# What happens with a new token: its slot of the window, and the page and the slot there of the token that stood in it
# (None and 0 where the slot was free).
Step = tuple[int, Page | None, int]


class Mover(Protocol):
    """Takes new tokens through the window in one call; the bytes are those that encoding and writing in numpy gives."""

    def takes(self, window: RecentWindow, keys: np.ndarray, values: np.ndarray) -> bool:
        """Whether it can: arrays as it needs them, and nothing in them that a codec would refuse."""

    def __call__(self, window: RecentWindow, steps: list[Step], keys: np.ndarray, values: np.ndarray) -> None:
        """For one new token after the other, do what its step says; keys, values float32
        [layers, kv_heads, tokens, head_dim]. Counts and tags are the store's.
        """
