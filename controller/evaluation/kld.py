"""Divergence of single policies from the 16-bit model, by how much text stands before a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvq.controller.evaluation.divergence import Outcome, outcome, reference
from kvq.controller.evaluation.pareto import Progress
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import make_policy
from kvq.runtime.session.model import Model

EDGES = (0, 64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192)


def measure(
    model: Model,
    texts: list[np.ndarray],
    policies: list[str],
    recent: int = 16,
    sink: int = 4,
    progress: Progress | None = None,
) -> dict[str, list[Outcome]]:
    """Outcomes by policy of texts int64 [context], all of one length."""
    chosen = {name: make_policy(name, model.bundle) for name in policies}
    scorer = Scorer(model, recent, sink)
    found: dict[str, list[Outcome]] = {name: [] for name in policies}
    for number, ids in enumerate(texts):
        expected = reference(scorer, ids)
        for name, policy in chosen.items():
            found[name].append(outcome(scorer, ids, expected, policy))
        if progress:
            progress(number + 1, len(texts), "divergence")
    return found


def by_position(found: dict[str, list[Outcome]], context: int) -> list[dict[str, Any]]:
    """Rows per policy and range of positions, and one for all positions together."""
    rows = []
    edges = [e for e in EDGES if e < context]
    spans = [(0, context), *zip(edges, [*edges[1:], context], strict=True)]
    for name, outcomes in found.items():
        for start, stop in spans:
            kld = np.concatenate([o.kld[start:stop] for o in outcomes])
            loss = np.concatenate([o.loss[start:stop] for o in outcomes])
            rows.append(
                {
                    "policy": name, "context": context, "positions": [start, stop], "tokens": len(kld),
                    "kld_mean": float(kld.mean()), "kld_p99": float(np.quantile(kld, 0.99)),
                    "top1": float(np.concatenate([o.same_top1[start:stop] for o in outcomes]).mean()),
                    "perplexity": float(np.exp(loss.mean())),
                }
            )  # fmt: skip
    return rows
