"""What `kvq.bench.compare` asks of a checkout, in processes whose kvq is that checkout's.

The file is run by its path: of kvq it uses only public names, which other checkouts have too.
"""

from __future__ import annotations

import time
from typing import Any


class Fresh:
    """A process that starts for one token."""

    def first_token(self, model: str) -> dict[str, float]:
        """Generate it; milliseconds of importing what loads a model."""
        begun = time.perf_counter()
        from kvq import load

        imported = time.perf_counter()
        next(load(model).session().generate("Once upon a time", max_tokens=1))
        return {"import, ms": 1e3 * (imported - begun)}


class Loaded:
    """A process that keeps a model loaded.

    Args:
        model: bundle, or name of the embedded one.
        threads: it may compute with.
    """

    def __init__(self, model: str, threads: int) -> None:
        import kvq

        self.kvq = kvq
        self.model = kvq.load(model, threads=threads)

    def about(self, policies: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Where kvq is, attention's backend, tokens of the context, and why some of these policies cannot be had."""
        refused, stats = {}, self.model.session("fp16").stats()
        for policy, options in policies.items():
            try:
                self.model.session(policy, **options)
            except self.kvq.KvqError as error:
                refused[policy] = str(error)
        where = {"file": self.kvq.__file__, "backend": f"{stats.backend} {stats.backend_detail}".strip()}
        return where | {"context": self.model.architecture.context, "refused": refused}

    def measure(self, policy: str, options: dict[str, Any], ids: list[int], steps: int) -> dict[str, float]:
        """Feed ids at once to a new session, then some of them one by one, of which the first is not counted.

        The figure of steps is their mean, as every sixteenth one may choose precisions for sixteen tokens.
        """
        session = self.model.session(policy, **options)
        seconds = []
        for fed in (ids, *([token] for token in ids[:steps])):
            begun = time.perf_counter()
            session.append(fed)
            seconds.append(time.perf_counter() - begun)
        return {"prefill, tokens/s": len(ids) / seconds[0], "decode, ms/token": 1e3 * sum(seconds[2:]) / (steps - 1)}
