"""The arms of a comparison at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import BudgetError
from kvq.runtime.precision.table import EXACT, PROTECTED, Geometry, named

# One precision for all tokens, in order of bytes; keys deserve more where a pair is not of equals.
LADDER = [*(named(*pair) for pair in ("2", "32", "3", "43", "4", "84", "8")), EXACT]
PROBES = 16


class Bytes:
    """What a text of a fixed length may spend on the tokens that are not protected.

    Args:
        geometry: of the store.
        length: tokens of the text.
        recent, sink: newest and first tokens, which are protected.
        protect_bits: bits of these.

    Attributes:
        stored: tokens that have left the window.
        sunk: how many of them, the first ones, are sink tokens; precisions are a choice for the others alone.
        protected: bytes of the window and the sink tokens.
    """

    def __init__(self, geometry: Geometry, length: int, recent: int, sink: int, protect_bits: int = 8) -> None:
        self.geometry, self.length, self.recent, self.sink = geometry, length, recent, sink
        self.protect_bits = protect_bits
        self.stored = max(0, length - recent)
        self.sunk = min(self.stored, sink)
        window = min(length, recent) * geometry.window_token_bytes(protect_bits)
        self.protected = window + self.sunk * geometry.token_bytes(PROTECTED[protect_bits])

    def each(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Bytes of a token of each pair, int64 [pairs]."""
        return np.array([self.geometry.token_bytes(pair) for pair in pairs])

    def left(self, kv_bits: float) -> float:
        """Bytes for the tokens whose precision is a choice, together."""
        return kv_bits * self.geometry.values * self.length / 8 - self.protected

    def check(self, kv_bits: float) -> None:
        """Raise BudgetError for a budget that the lowest precision exceeds: arms would not be at equal bytes."""
        lowest = self.bits((self.stored - self.sunk) * self.each(LADDER[:1])[0] + self.protected)
        if kv_bits < lowest:
            raise BudgetError(
                f"{kv_bits:g} bits per value are below what is possible: {lowest:.2f} for {self.length} tokens with"
                f" {self.recent} recent and {self.sink} sink tokens at {self.protect_bits} bits; give more, a"
                " longer context, or protect fewer"
            )

    def bits(self, nbytes: float) -> float:
        """Bits per value of the whole text."""
        return 8 * nbytes / (self.geometry.values * self.length)


def static_mix(space: Bytes, kv_bits: float, rng: np.random.Generator) -> np.ndarray:
    """The two neighbours of a budget on the static ladder, mixed at random; uint8 [tokens, 2]."""
    every = space.each(LADDER)
    # In a head of few channels, where words are not filled, a step may cost no more than one that stores better.
    steps = [i for i in range(len(LADDER)) if every[i] < every[i + 1 :].min(initial=every[i] + 1)]
    nbytes = every[steps]
    free = space.stored - space.sunk
    target = space.left(kv_bits) / max(1, free)
    low = int(np.clip(np.searchsorted(nbytes, target, side="right") - 1, 0, len(steps) - 2))
    share = np.clip((target - nbytes[low]) / (nbytes[low + 1] - nbytes[low]), 0, 1)
    chosen = np.full(space.length, low)
    chosen[space.sunk + rng.permutation(free)[: int(share * free)]] += 1
    return np.array(LADDER, np.uint8)[steps][chosen]


def shuffled(space: Bytes, bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same precisions given to other tokens: what is left of a routing without its knowledge."""
    mixed, free = bits.copy(), slice(space.sunk, space.stored)
    mixed[free] = rng.permutation(bits[free], axis=0)
    return mixed


def oracle(space: Bytes, kv_bits: float, damage: np.ndarray, classes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The best use of the budget if single-token damages, float [tokens, classes], add up; uint8 [tokens, 2]."""
    nbytes = space.each(classes)
    left = space.left(kv_bits)
    low, high = 1e-12, 1e3
    for _ in range(100):
        price = (low * high) ** 0.5
        spent = nbytes[(damage[space.sunk : space.stored] + price * nbytes).argmin(1)].sum()
        low, high = (price, high) if spent > left else (low, price)
    return np.array(classes, np.uint8)[(damage + high * nbytes).argmin(1)]


class DamageMeter:
    """Damage of every token of a text, for the oracle: `PROBES` draws of `kvq.controller.training.damage`."""

    classes = LADDER

    def __init__(self, bundle: Bundle, recent: int) -> None:
        import torch

        from kvq.controller.training.parallel import ParallelModel

        self._model = ParallelModel.load(bundle, recent)
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float64 [tokens, classes] in nats, of ids int64 [tokens]."""
        import torch

        from kvq.controller.training.damage import probe

        batch = torch.from_numpy(np.asarray(ids, np.int64))[None].to(self._model.device)
        signed = probe(self._model, batch, self._generator, self.classes, PROBES)[0][:, 0]  # [draws, tokens, classes]
        damage: np.ndarray = np.square(signed, dtype=np.float64).mean(0) / 2
        return damage
