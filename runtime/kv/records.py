"""Where every token of a store stands: a look at pages and window, token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.table import PROTECTED


class StoredTokens(NamedTuple):
    """Precision and bytes of every token, by position.

    bits: uint8 [tokens, 2], of keys and values as stored now; in the window those of `protect_bits`.
    chosen: uint8 [tokens, 2], what they are once out of the window.
    in_window: bool [tokens].
    nbytes: int64 [tokens], codes, scales and tag.
    """

    bits: np.ndarray
    chosen: np.ndarray
    in_window: np.ndarray
    nbytes: np.ndarray


def stored_tokens(store: KVStore) -> StoredTokens:
    """Read precision and bytes of every token off the store's pages and window."""
    bits, nbytes = np.zeros((store.length, 2), np.uint8), np.zeros(store.length, np.int64)
    for pair, bucket in store.buckets.items():
        for page in bucket.pages:
            at = page.positions[: page.count]
            held = store.geometry.narrow if page.narrow else store.geometry
            bits[at], nbytes[at] = pair, held.token_bytes(pair)
    chosen, window, start = bits.copy(), store.window, store.bucketed
    if window.count:
        bits[start:], nbytes[start:] = PROTECTED[store.protect_bits], window.token_bytes
        chosen[start:] = store.due()
    return StoredTokens(bits, chosen, np.arange(store.length) >= start, nbytes)
