"""Peak memory of a run, split into what it is made of.

    python -m kvq.bench.memory --context 512,1024 --policy fp16,int4

Every row is a process of its own: resident memory after loading the model, the peak while a
prompt of that many tokens is prefilled and 16 tokens are decoded, the bytes of the KV store,
and what is left: buffers of one forward pass and one layer's scratch.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import click
import numpy as np

DECODED = 16


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(model: str | None, policy: str, context: int, chunk: int) -> dict:
    """One row, measured in this process."""
    import kvq

    loaded = kvq.load(model)
    after_load = resident_bytes()
    ids = np.random.default_rng(0).integers(0, loaded.architecture.vocab, context - DECODED)
    session = loaded.session(policy, prefill_chunk=chunk)
    session.append(ids)
    for token in range(DECODED):
        session.append([token])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = session.stats()
    return {
        "policy": policy,
        "context": context,
        "loaded_bytes": after_load,
        "peak_rss_bytes": peak,
        "kv_bytes": stats.kv_nbytes,
        "other_bytes": peak - after_load - stats.kv_nbytes,
    }


@click.command()
@click.option("--model", help="bundle; the embedded model if not given")
@click.option("--context", default="512,1024", show_default=True)
@click.option("--policy", default="fp16,int4,mixed", show_default=True)
@click.option("--chunk", default=128, show_default=True, help="prefill chunk, in tokens")
@click.option("--child", is_flag=True, hidden=True)
def main(model, context, policy, chunk, child) -> None:
    """Print peak memory by policy and context, in MB."""
    if child:
        click.echo(json.dumps(measure(model, policy, int(context), chunk)))
        return
    click.echo("| policy | context | model loaded | peak | KV store | buffers and scratch |")
    click.echo("|---|---|---|---|---|---|")
    for name in policy.split(","):
        for length in context.split(","):
            command = [sys.executable, "-m", "kvq.bench.memory", "--child", "--policy", name, "--context", length]
            command += ["--chunk", str(chunk)] + (["--model", model] if model else [])
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [row[k] / 1e6 for k in ("loaded_bytes", "peak_rss_bytes", "kv_bytes", "other_bytes")]
            click.echo(f"| {name} | {length} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
