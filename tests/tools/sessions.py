"""Sessions of the tiny model: ids to read, and what is looked at."""

from __future__ import annotations

import numpy as np

CONTEXT = 256
VOCAB = 512
IDS = np.random.default_rng(0).integers(1, VOCAB, 120).tolist()
# 16 bits everywhere and a window over the whole text: nothing but the order of sums may differ.
EXACT = {"policy": "fp16", "recent": CONTEXT}
# New tokens see each other unrounded and all others at 16 bits, so the chunking moves logits (here
# of standard deviation 2) a little.
ROUNDED = 1e-3
# Tokens that have left the window are halves, which round nine times coarser. Measured: 0.004.
HALF = 0.01
# Policies that look at positions only; the features that `rule` reads depend on what earlier chunks read.
BLIND = ["fp16", "int8", "int4", "int2", "k8v4", "k4v2", "mixed", "random"]


def greedy(session, prompt, count, **options):
    """The tokens of a greedy generation."""
    responses = session.generate(prompt, max_tokens=count, temperature=0, ignore_eos=True, **options)
    return [response.token for response in responses]


def appended(session, ids, sizes):
    """Append ids in parts of those sizes (the last size repeats); the last logits."""
    sizes, at = list(sizes), 0
    while at < len(ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits = session.append(ids[at : at + size])
        at += size
    return logits


def rows(session):
    """Tokens of the store by precision, empty ones left out."""
    return {name: row["tokens"] for name, row in session.store.account().items() if row["tokens"]}


def positions(session):
    """Which tokens of the text the store holds at which precision, and how many are in the window."""
    found = {
        str(bits): [int(at) for page in bucket.pages for at in page.positions[: page.count]]
        for bits, bucket in session.store.buckets.items()
        if bucket.count
    }
    return found | {"recent": session.store.window.count}
