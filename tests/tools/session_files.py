"""Session files taken apart and put together again, for tests that write bad ones."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

START = struct.Struct("<8sII32s")


def split(path: Path) -> tuple[dict, bytes]:
    """Header and payload of a session file."""
    data = path.read_bytes()
    length = START.unpack(data[: START.size])[2]
    return json.loads(data[START.size : START.size + length]), data[START.size + length :]


class Bits(NamedTuple):
    """A pair under the name that the golden digests were made with."""

    k: int
    v: int


def sealed(header: dict | bytes, payload: bytes, magic: bytes = b"KVQSESS\n", version: int = 1) -> bytes:
    """A session file with digests that are right, whatever is in it."""
    if isinstance(header, dict):
        header = json.dumps(header | {"payload_sha256": hashlib.sha256(payload).hexdigest()}).encode()
    return START.pack(magic, version, len(header), hashlib.sha256(header).digest()) + header + payload


def contents(session) -> dict:
    """Everything a session is made of, as bytes: equal for two sessions that cannot be told apart."""
    session.store.settle()
    store, window = session.store, session.store.window
    slots = window.slots(store.length - window.count, store.length)
    pages = [
        (Bits(*pair), page.capacity, page.count, *(np.ascontiguousarray(part).tobytes() for part in encoded(page)))
        for pair, bucket in store.buckets.items()
        for page in bucket.pages
    ]
    return {
        "tokens": list(session.tokens),
        "pending": list(session.pending),
        "pages": pages,
        "window": [part.tobytes() for slot in (window.keys, window.values) for part in slot.encoded(slots)],
        "bits": window.chosen[slots].tolist(),
        "counts": {Bits(*pair): (bucket.count, bucket.nbytes) for pair, bucket in store.buckets.items()},
        "order": [Bits(*pair) for pair in store.buckets],
        "length": (store.length, window.count, window.capacity, store.sink, store.nbytes, store.used_nbytes),
        "settings": (session.policy.name, session.prefill_chunk, session.kv_bits, session.kv_memory),
        "metadata": session.metadata,
    }


def encoded(page) -> list[np.ndarray]:
    """The tokens of a page, free of its layout."""
    used = slice(0, page.count)
    parts = [*page.keys.encoded(used), *page.values.encoded(used)]
    return [page.positions[used], *(array for part in parts for array in part)]


def continued(session, count: int, **options) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of a continuation."""
    options = {"temperature": 0, "ignore_eos": True} | options
    return [(r.token, r.logprob) for r in session.generate(None, max_tokens=count, **options)]
