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
from kvq.runtime.precision.table import PROTECTED, Geometry, Pair
from kvq.runtime.precision.table import pairs as all_pairs

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


def as_read(tokens, recent=0, sink=0, protect_bits=16, geometry=None):
    """The keys and values a reader must see, token by token: the specification of `KVStore`, written slowly.

    The newest `recent` tokens are what the window's codec makes of them; every other token has
    passed through the window, where there is one, and is what its codecs make of that, those of
    `protect_bits` for the first `sink` ones; of a geometry with profiles, each layer's own.
    """
    count, layers = len(tokens.bits), len(tokens.keys)
    by_layer = geometry.by_layer if geometry else lambda pair: [pair] * layers
    read = []
    for side, x in enumerate((tokens.keys, tokens.values)):
        seen = np.empty_like(x)
        for t in range(count):
            kept = WINDOWS[protect_bits].roundtrip(x[:, :, t]) if recent else x[:, :, t]
            pair = (protect_bits,) * 2 if t < sink else tokens.bits[t].tolist()
            for layer, of_layer in enumerate(by_layer(pair)):
                there = kept[layer] if t >= count - recent else CODECS[of_layer[side]].roundtrip(kept[layer])
                seen[layer, :, t] = there
        read.append(seen)
    return read


def with_profiles(geometry, seed, share=0.5):
    """The geometry with precisions by layer, drawn from all there are, for a share of the pairs."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in all_pairs() if pair not in PROTECTED.values() and rng.random() < share]
    drawn = [rng.choice(np.array(WIDTHS), (geometry.layers, 2)).tolist() for _ in pairs]
    profiles = tuple((pair, tuple(Pair(*own) for own in by)) for pair, by in zip(pairs, drawn, strict=True))
    return geometry._replace(profiles=profiles)


@st.composite
def drawn_geometries(draw):
    """Small shapes; half of them have profiles."""
    geometry = Geometry(draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.sampled_from((8, 16, 24))))
    return with_profiles(geometry, draw(seeds)) if draw(st.booleans()) else geometry


seeds = st.integers(0, 2**32 - 1)
geometries = drawn_geometries()
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
