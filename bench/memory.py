"""Peak memory of a run, split into what it is made of.

    python -m kvq.bench.memory --context 512,1024 --policy fp16,int4

Every row is a process of its own: resident memory after loading the model, the peak while a prompt of that many tokens
is prefilled and 16 tokens are decoded, the bytes of the KV store, and what is left: buffers of one forward pass and one
layer's scratch.
"""

from __future__ import annotations

import click
import numpy as np

import kvq
from kvq.bench.machine import resident_bytes
from kvq.bench.options import HELP, counts, json_option, names
from kvq.bench.process import Child
from kvq.bench.report.tables import Columns, Results, Row, number

DECODED = 16
COLUMNS: Columns = {
    "policy": lambda row: row["policy"],
    "context": number("context", "d", 1),
    "model loaded": number("loaded_bytes", ".1f", 1e-6),
    "peak": number("peak_rss_bytes", ".1f", 1e-6),
    "KV store": number("kv_bytes", ".1f", 1e-6),
    "buffers and scratch": number("other_bytes", ".1f", 1e-6),
}


class Peak:
    """The measured process, see `kvq.bench.child`."""

    def measure(self, model: str | None, policy: str, context: int, chunk: int) -> Row:
        """One row; `context` counts the decoded tokens."""
        loaded = kvq.load(model)
        after_load = resident_bytes()
        ids = np.random.default_rng(0).integers(0, loaded.architecture.vocab, context - DECODED)
        session = loaded.session(policy, prefill_chunk=chunk)
        session.append(ids)
        for token in range(DECODED):
            session.append([token])
        peak, cached = resident_bytes(peak=True), session.stats().kv_nbytes
        row = {"policy": policy, "context": context, "loaded_bytes": after_load, "peak_rss_bytes": peak}
        return row | {"kv_bytes": cached, "other_bytes": peak - after_load - cached}


@click.command(context_settings=HELP)
@click.option("--model", help="bundle; the embedded model if not given")
@click.option("--context", default="512,1024", show_default=True, callback=counts("context"))
@click.option("--policy", default="fp16,int4,mixed", show_default=True, callback=names("policy"))
@click.option("--chunk", default=128, show_default=True, help="prefill chunk, in tokens")
@json_option
def main(model, context, policy, chunk, json_file) -> None:
    """Print peak memory by policy and context, in MB."""
    results = Results(COLUMNS, json_file)
    for name in policy:
        for length in context:
            with Child("kvq.bench.memory:Peak", {}) as child:
                results.add(child.ask("measure", model=model, policy=name, context=length, chunk=chunk))


if __name__ == "__main__":
    main()
