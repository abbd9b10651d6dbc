"""Random keys, values and precisions for the store and attention tests, and what a reader of the cache must see."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import CODECS, Codec, CodecSet
from kvq.runtime.precision.codecs.uniform import WINDOWS
from kvq.runtime.precision.key_turns import KeyTurns
from kvq.runtime.precision.table import Geometry

WIDTHS = tuple(sorted(CODECS))  # ids of all precisions: a new codec is tested at once
HEAD_DIMS = (8, 16, 24, 64, 80, 128)
ODD_COUNTS = (0, 1, 7, 15, 16, 17, 63, 65)


def examples(count):
    """Hypothesis settings for tests whose time depends on how busy the machine is."""
    return settings(max_examples=count, deadline=None)


class Tokens(NamedTuple):
    """Keys, values float32 [layers, kv_heads, tokens, head_dim] and bits uint8 [tokens, 2]."""

    keys: np.ndarray
    values: np.ndarray
    bits: np.ndarray

    def part(self, start, stop):
        return Tokens(self.keys[:, :, start:stop], self.values[:, :, start:stop], self.bits[start:stop])


def random_tokens(seed, geometry, count, widths=WIDTHS):
    """Gaussian tokens whose precisions are drawn from all pairs of `widths`."""
    rng = np.random.default_rng(seed)
    shape = (geometry.layers, geometry.kv_heads, count, geometry.head_dim)
    keys, values = rng.standard_normal((2, *shape), np.float32)
    return Tokens(keys, values, rng.choice(np.array(widths, np.uint8), (count, 2)))


def random_feedback(seed, geometry):
    """Shares of errors as a bundle could have them: float16 [layers, kv_heads, head_dim, head_dim]."""
    shape = (geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.head_dim)
    return np.triu(np.random.default_rng(seed).normal(0, 0.3, shape), 1).astype(np.float16)


def random_turns(seed, geometry, pairs=5):
    """What keys turn with, as a bundle could have it: frequencies are of two kinds, and some layers but the first one
    are left as they are.
    """
    rng = np.random.default_rng(seed)
    frequencies = np.exp(-rng.uniform(0, 8, (2, pairs)))[rng.integers(0, 2, geometry.layers)]
    vectors = rng.normal(0, 1, (geometry.layers, geometry.kv_heads, pairs, 2, geometry.head_dim))
    vectors[1:][rng.integers(0, 3, geometry.layers - 1) == 0] = 0
    return KeyTurns(frequencies.astype(np.float32), vectors.astype(np.float32))


def fill(store, tokens, cuts=()):
    """Append the tokens in the chunks between the cuts (sorted here; repeated cuts give empty chunks)."""
    edges = [0, *sorted(cuts), len(tokens.bits)]
    for start, stop in pairwise(edges):
        store.append(*tokens.part(start, stop))
    return store


def filled_store(geometry, tokens, recent=0, sink=0, cuts=(), protect_bits=16):
    """A new store that holds the tokens."""
    return fill(KVStore(geometry, recent=recent, sink=sink, protect_bits=protect_bits), tokens, cuts)


def as_read(tokens, recent=0, sink=0, protect_bits=16):
    """The keys and values a reader must see, token by token: the specification of `KVStore`, written slowly.

    The newest `recent` tokens are what the window's codec makes of them; every other token has
    passed through the window, where there is one, and is what its codecs make of that, those of
    `protect_bits` for the first `sink` ones.
    """
    count = len(tokens.bits)
    read = []
    for side, x in enumerate((tokens.keys, tokens.values)):
        seen = np.empty_like(x)
        for t in range(count):
            kept = WINDOWS[protect_bits].roundtrip(x[:, :, t]) if recent else x[:, :, t]
            width = protect_bits if t < sink else int(tokens.bits[t, side])
            seen[:, :, t] = kept if t >= count - recent else CODECS[width].roundtrip(kept)
        read.append(seen)
    return read


geometries = st.builds(
    Geometry,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from((8, 16, 24)),
    windows=st.just(()),
)
seeds = st.integers(0, 2**32 - 1)
protected = st.sampled_from((8, 16))


def _is_cut(array):
    """Whether an array is all there is of its memory: a part of a slab, see `kvq.runtime.machine.hugepages`."""
    return isinstance(array.base, memoryview)


def arrays_in(thing):
    """Every numpy array reachable from an object, each once; but for what belongs to codecs, which all stores share."""
    found, todo, seen = [], [thing], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, Codec | CodecSet):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            if item.base is not None and not _is_cut(item.base):  # its memory is what counts, all of it
                todo.append(item.base)
                continue
            found.append(item)
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return found
