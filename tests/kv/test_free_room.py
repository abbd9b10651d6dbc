"""Free room: what half-empty pages add to the bytes of the tokens, promised for a text of 512 and of 2,048."""

from __future__ import annotations

import numpy as np
import pytest

from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.pages import PAGE_TOKENS, BucketBytes
from kvq.runtime.kv.sides import last_capacity, parts_of
from kvq.runtime.kv.slots import Encoded
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Geometry, Pair
from tests.tools.kvdata import with_profiles

SMOLLM = Geometry(layers=30, kv_heads=3, head_dim=64)
RECENT, SINK = 16, 4
# Shares of the classes as `adaptive` gives them at 4.25 bits.
ADAPTIVE = {Pair(4, 2): 0.47, Pair(4, 4): 0.29, Pair(8, 4): 0.19, Pair(2, 2): 0.03, Pair(8, 8): 0.02}


def free_share(shares, length):
    """Bytes of free room over those of the tokens, of a text of that length."""
    rest = length - RECENT - SINK
    counts = {pair: int(share * rest) for pair, share in shares.items()}
    counts[next(iter(counts))] += rest - sum(counts.values())
    counts[Pair(16, 16)] = SINK
    used = sum(count * SMOLLM.token_bytes(pair) for pair, count in counts.items())
    held = sum(BucketBytes(pair, SMOLLM)[count] for pair, count in counts.items())
    return (held - used) / (used + RECENT * SMOLLM.window_token_bytes(16))


@pytest.mark.parametrize(
    ("shares", "length", "most"),
    [({Pair(4, 4): 1}, 512, 0.02), ({Pair(4, 4): 1}, 2048, 0.01), (ADAPTIVE, 512, 0.07), (ADAPTIVE, 2048, 0.02)],
    ids=["int4-512", "int4-2048", "adaptive-512", "adaptive-2048"],
)
def test_free_room_is_little_of_a_cache(shares, length, most):
    """In the mean over lengths about it: where a bucket ends in its page is chance."""
    assert np.mean([free_share(shares, n) for n in range(length - 64, length + 65)]) <= most


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("pair", [Pair(2, 2), Pair(8, 4), Pair(16, 16)], ids=str)
@pytest.mark.parametrize("share", [0, 1])
def test_bytes_grow_with_the_tokens_and_are_those_of_a_bucket(layers, pair, share):
    geometry = with_profiles(Geometry(layers, 2, 8), layers, share)
    nbytes, bucket = BucketBytes(pair, geometry), Bucket(pair, geometry)
    x = np.ones((layers, 2, 1, 8), np.float32)
    parts = [[Encoded(*CODECS[one].encode(x[own])) for one, own in side] for side in parts_of(pair, geometry)]
    for n in range(2 * PAGE_TOKENS):
        assert bucket.nbytes == nbytes[n] <= nbytes[n + 1]
        assert 0 <= nbytes[n] - n * bucket.token_bytes <= nbytes.most_free
        bucket.append(*parts, np.array([n], np.int32))


@pytest.mark.parametrize("layers", [3, 5, 30])
@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_layers_that_share_a_tile_keep_their_own_tokens(layers, count):
    geometry = Geometry(layers, 2, 8)
    assert last_capacity(count, layers) < 16
    kv = np.random.default_rng(1).standard_normal((2, layers, 2, count, 8)).astype(np.float32)
    store = KVStore(geometry, recent=0)
    store.append(kv[0], kv[1], np.full((count, 2), 16, np.uint8))
    for layer in range(layers):
        ((keys, values),) = store.blocks(layer, 64)
        np.testing.assert_array_equal(keys, kv[0, layer].astype(np.float16))
        np.testing.assert_array_equal(values, kv[1, layer].astype(np.float16))
