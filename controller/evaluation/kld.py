"""Divergence of single policies from the 16-bit model, by how much text stands before a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvq.controller.evaluation.arms import Bytes
from kvq.controller.evaluation.divergence import Divergence, outcome, reference
from kvq.controller.evaluation.llama import CACHE_BITS
from kvq.controller.evaluation.pareto import Progress
from kvq.controller.evaluation.peer import LlamaCaches
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import make_policy
from kvq.runtime.session.model import Model

EDGES = (0, 64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192)


@dataclass
class Measured:
    """An arm and what it did to the texts.

    Attributes:
        policy: its name; of a peer "llama.cpp" and its cache's type.
        kv_bits: the budget, if it has one.
        texts: divergence of each text.
        bits: bits per value of each text, all told.
    """

    policy: str
    kv_bits: float | None = None
    texts: list[Divergence] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)


def measure(
    model: Model,
    texts: list[np.ndarray],
    arms: Sequence[tuple[str, float | None]],
    recent: int = 16,
    sink: int = 4,
    protect_bits: int | None = None,
    peer: LlamaCaches | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """All arms on texts int64 [context], all of one length.

    Args:
        model: the loaded model.
        texts: token ids.
        arms: policies by name, each with its budget or None.
        recent, sink: newest and first tokens, protected at protect_bits as in `Scorer`, in the arms of the model.
        peer: whose caches get the same ids, each against its own exact cache.
        progress: called as work goes on.
    """
    shape, scorer = model.architecture, Scorer(model, recent, sink, protect_bits)
    space = Bytes(shape.geometry, len(texts[0]), recent, sink)
    policies = [make_policy(name, model.bundle) for name, _ in arms]
    ours = [Measured(name, kv_bits) for name, kv_bits in arms]
    theirs = [Measured(f"llama.cpp {kind}") for kind in (peer.kinds if peer else ())]
    for number, ids in enumerate(texts):
        expected = reference(scorer, ids)
        for arm, policy in zip(ours, policies, strict=True):
            found = outcome(scorer, ids, expected, policy, arm.kv_bits)
            arm.texts.append(found)
            arm.bits.append(space.bits(found.used_nbytes))
        if peer is not None:
            for arm, kind, diverged in zip(theirs, peer.kinds, peer.divergences(ids), strict=True):
                arm.texts.append(diverged)
                arm.bits.append(CACHE_BITS[kind])
        if progress:
            progress(number + 1, len(texts), "divergence")
    return [*ours, *theirs]


def by_position(found: list[Measured], context: int) -> list[dict[str, Any]]:
    """Rows per arm and range of positions, and one for all positions together; "bits" are those of the whole texts."""
    rows = []
    edges = [e for e in EDGES if e < context]
    spans = [(0, context), *zip(edges, [*edges[1:], context], strict=True)]
    for arm in found:
        for start, stop in spans:
            kld = np.concatenate([text.kld[start:stop] for text in arm.texts])
            loss = np.concatenate([text.loss[start:stop] for text in arm.texts])
            rows.append(
                {
                    "policy": arm.policy, **({} if arm.kv_bits is None else {"kv_bits": arm.kv_bits}),
                    "bits": round(float(np.mean(arm.bits)), 3), "context": context, "positions": [start, stop],
                    "tokens": len(kld), "kld_mean": float(kld.mean()), "kld_p99": float(np.quantile(kld, 0.99)),
                    "top1": float(np.concatenate([text.same_top1[start:stop] for text in arm.texts]).mean()),
                    "perplexity": float(np.exp(loss.mean())),
                }
            )  # fmt: skip
    return rows
