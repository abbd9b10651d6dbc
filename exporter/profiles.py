"""Profiles of a model: classes of tokens get the precisions that hurt it least, layer by layer, at no more bytes.

How much an error of keys or values hurts depends on the layer, tenfold in a model of 30. So each side of each layer is
read at few bits alone, its effect carried to the end of the model, and the divergence of the predictions taken.
Divergence grows with the square of a small error, so what other precisions do follows from what they do to the
attention of that layer alone. A class then gets the assignment of least divergence in all, among those that take at
most its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import numpy as np

from kvq.exporter.profile_probe import TOKENS, Damages, probe
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.profiles import Profiles
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import PROTECTED, Pair, named

NAMES = ("2", "3", "4", "8")  # of the precisions that layers choose among, from few bytes to many
LEAST_TOKENS = 128  # of a text that says anything
TEXTS = 3  # of TOKENS each, that layers are measured on: what a single one says of int3 is half wrong
# How much of what layers differ by, in logarithms, is believed: what two texts say of them correlates by 0.8.
BELIEVED = 0.75
LEAST_GAIN = 0.02  # of a class's divergence, or it stays as it is
# Bits by which the sides of a class may differ for bytes to go from one to the other: where they differ more, the class
# is for tokens whose keys need them, or whose values.
ALIKE = 1


def profiles_for(bundle: Bundle, ids: np.ndarray, progress: Callable[[int, int], None] | None = None) -> Profiles:
    """Profiles of a bundle that has none yet; none where they could not help.

    Args:
        bundle: the model, its keys as they will be stored.
        ids: int64 [tokens] of a calibration text.
        progress: called with the layers done and all there are.
    """
    shape = bundle.manifest.architecture
    precisions = [named(name).k for name in NAMES]
    sizes = {id_: CODECS[id_].vector_bytes(shape.head_dim) for id_ in precisions}
    by_bytes = list(sizes.values())
    # Of few channels several precisions take the same words: there more bits cost nothing.
    if shape.layers < 2 or len(ids) < LEAST_TOKENS or sorted(set(by_bytes)) != by_bytes:
        return ()
    texts = [ids[at : at + TOKENS] for at in _starts(len(ids))]
    every = []
    for number, text in enumerate(texts):

        def measured(done: int, count: int, before: int = number) -> None:
            if progress is not None:
                progress(before * count + done, len(texts) * count)

        every.append(probe(bundle, text, precisions, measured))
    return choose(believed(every), sizes)


def _starts(tokens: int) -> list[int]:
    """Where the texts that are measured begin in one of so many tokens: far apart."""
    count = max(1, min(TEXTS, tokens // TOKENS))
    return [max(0, (2 * i + 1) * tokens // (2 * count) - TOKENS // 2) for i in range(count)]


def believed(every: list[Damages]) -> Damages:
    """What several texts together say of the layers, which are more alike than any few texts have them."""
    ids = list(every[0][0][0])
    # [texts, layers, sides, precisions]
    found = np.array([[[[side[id_] for id_ in ids] for side in layer] for layer in damages] for damages in every])
    mean = np.maximum(found.mean(0), 1e-30)
    logs = np.log(mean).mean(-1, keepdims=True)  # of a side of a layer, all precisions alike
    mean *= np.exp((BELIEVED - 1) * (logs - logs.mean()))
    return [tuple(dict(zip(ids, side, strict=True)) for side in layer) for layer in mean.tolist()]  # type: ignore[misc]


def choose(damages: Damages, sizes: dict[int, int]) -> Profiles:
    """Profiles of all classes that gain by one.

    Args:
        damages: of every layer its keys' and its values', by precision.
        sizes: bytes of a vector by precision, from few to many.
    """
    found = []
    for k in sizes:
        for v in sizes:
            pair = Pair(k, v)
            if pair in PROTECTED.values():
                continue
            if 0 <= pair.bits[0] - pair.bits[1] <= ALIKE:
                flat = assignment([d for sides in damages for d in sides], sizes, len(damages) * (sizes[k] + sizes[v]))
                by_layer = [Pair(*flat[at : at + 2]) for at in range(0, len(flat), 2)]
            else:
                sides = (
                    assignment([d[s] for d in damages], sizes, len(damages) * sizes[own]) for s, own in enumerate(pair)
                )
                by_layer = [Pair(*own) for own in zip(*sides, strict=True)]
            if _total(damages, by_layer) < (1 - LEAST_GAIN) * _total(damages, [pair] * len(damages)):
                found.append((pair, tuple(by_layer)))
    return tuple(sorted(found))


def _total(damages: Damages, by_layer: list[Pair]) -> float:
    return sum(d[side][pair[side]] for d, pair in zip(damages, by_layer, strict=True) for side in (0, 1))


def assignment(damages: list[dict[int, float]], sizes: dict[int, int], room: int) -> list[int]:
    """The precision of every item such that their damages are least in all and their sizes at most `room` together.

    Exact, by dynamic programming over the bytes beyond the smallest precision's; of equals the one of fewer bytes.
    """
    least = min(sizes.values())
    unit = gcd(*(size - least for size in sizes.values())) or 1
    steps = {precision: (size - least) // unit for precision, size in sizes.items()}
    places = (room - least * len(damages)) // unit + 1
    best, picked = np.zeros(places), []
    for damage in damages:
        found, pick = np.full(places, np.inf), np.zeros(places, np.int64)
        for precision, step in sorted(steps.items(), key=lambda item: item[1]):
            if step >= places:
                continue
            total = np.full(places, np.inf)
            total[step:] = best[: places - step] + damage[precision]
            better = total < found
            found[better], pick[better] = total[better], precision
        best = found
        picked.append(pick)
    at, chosen = places - 1, []
    for pick in reversed(picked):
        chosen.append(int(pick[at]))
        at -= steps[chosen[-1]]
    return chosen[::-1]
