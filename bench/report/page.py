"""Rows of the decode benchmark as a table for a terminal, and as a page of the documentation.

Speeds are given next to the fastest arm of each other runtime in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvq.bench.report.plot import write_plot
from kvq.bench.report.tables import Columns, Row, aligned, markdown, number, quartiles

# Name in headings -> how its arms begin.
PEERS = {"ort-gqa": "ort-gqa-", "llama": "llama-", "openvino": "openvino", "genai": "genai"}

INTRODUCTION = """# Performance

Time of one decode step against the number of cached tokens, kvq next to other runtimes on the same machine. This page
is written by `python -m kvq.bench.report` from measurements of `python -m kvq.bench.decode`.

The newest run comes first. Runs of kvq 0.1 have 4-bit weights, which are no longer the default: they are kept for
shapes and lengths that were not measured again; the rest of them is in their rows, `docs/performance/`.

How it is measured:

* All arms run the same random weights of a SmolLM's shape: int8 in blocks of 64 with int8 activations (one scale a row
  in OpenVINO), in runs of kvq 0.1 int4 with embedding and head in int8; transformers runs their float32 values. Shapes
  called -int4 have 4 bits with zero points in blocks of 64, embedding and head in int8; llama.cpp has Q4_0 of them, and
  OpenVINO symmetric int4 in groups of 64, which are as many bits and other numbers. What kvq's products take is not
  rotated here; in bundles of real models it is, for 2 % of a step.
* Each arm has a process of its own and is set up in the fastest form we found, which its settings below name. A step
  goes from a token id to the logits of the next token; sampling is left out.
* Arms take turns in short bursts of steps within one run, so all of them see the same state of the machine. The first
  burst, and the first step of each, are not counted. The figure is the median; 25 % of the steps were faster than the
  first number of the spread, 25 % slower than the second. Ratios are of the medians of two bursts of one turn, as the
  machine's speed is another one minutes later: their median, in brackets their quartiles.
* Prefill: the cache filled from empty, arms in turn, another one first each time; a first time is not counted where
  there are others. Given are medians and quartiles, of ratios too. kvq-adaptive reads prompts stepwise, as policies
  that look at tokens do by default: what it stores is what decoding token by token stores.
* Before an arm is timed its logits over 64 + 8 tokens are compared with kvq's numpy backend. Given is the root mean
  square difference over the standard deviation of the logits; unrelated logits differ by 1.4. Arms that can keep
  activations in float32 are compared so; the others differ by their own rounding of activations or cache.
* The floor is the time to read the weights and the cache once, at the bandwidth of a plain read of a large array by as
  many threads in the same run. Peak memory is that of the arm's whole process.
* Policy / step: what features, controller and budget take of a step, for the policies that look at tokens. It is
  measured inside the timed steps, as a mean over all of them: every sixteenth step chooses for sixteen tokens. Their
  budget is 3.25 bits a value; their controllers have the real architecture and random weights.
* Attention / read: attention alone over the packed cache, all layers, and its part of the bandwidth of a plain read of
  the same arrays in as many threads (`kvq.bench.kvq.attention`).
"""


def _group(row: Row, shown: str) -> str:
    """What is shown of a row, with its group where there are several."""
    return shown + (f" (group {row['group']})" if row.get("groups", 1) > 1 else "")


STEP: Columns = {
    "ms/token": number("ms_per_token", ".2f"),
    "spread": lambda row: f"{row['ms_p25']:.2f} - {row['ms_p75']:.2f}",
}
SPEED: Columns = {
    "floor ms": number("floor_ms", ".2f"),
    "x floor": number("over_floor", ".2f"),
    "GB/s": number("gb_per_s", ".1f"),
}
MEMORY: Columns = {
    "KV MB": number("kv_bytes", ".1f", 1e-6),
    "peak MB": number("peak_rss_bytes", ".0f", 1e-6),
    "difference": number("check_difference", ".1e"),
}
TERMINAL: Columns = {
    "arm": lambda row: row["arm"],
    "context": number("context", "d", 1),
    **STEP,
    **SPEED,
    "attention": number("attention_gb_per_s", ".1f"),
    "of read": number("attention_of_read", ".2f"),
    "policy ms": number("policy_ms", ".3f"),
    "prefill/s": number("prefill_tokens_per_s", ".0f"),
    **MEMORY,
    "backend": lambda row: _group(row, row["backend"]),
}


def decode_table(rows: list[Row]) -> str:
    """A table for a terminal, with a line on what was measured."""
    bandwidth, idle = (max(row[name] for row in rows) for name in ("bandwidth_gb_per_s", "idle_cpu_share"))
    note = (
        f"{rows[0]['shape']}, {rows[0]['threads']} threads, median (spread: quartiles) of"
        f" {min(row['steps'] for row in rows)} steps;"
        f" memory read at {bandwidth:.1f} GB/s; difference: of logits from those of the reference on numpy;"
        f" idle arms took {100 * idle:.1f} % of a core"
    )
    return "\n".join([*aligned(TERMINAL, rows), note])


def _step_times(row: Row) -> np.ndarray:
    """Milliseconds of a step in each turn; their median alone in files of before turns were kept."""
    return np.array(row.get("burst_ms", [row["ms_per_token"]]))


def _prefill_times(row: Row) -> np.ndarray:
    """Seconds of each turn; of the median alone in files of before turns were kept."""
    return np.array(row.get("prefill_seconds", [row["context"] / row["prefill_tokens_per_s"]]))


def _beside(rows: list[Row], peer: str, times: Callable[[Row], np.ndarray]) -> Callable[[Row], str]:
    """A cell with how many times as long as an arm the fastest one of a peer takes that took turns with it.

    Turn by turn, since the machine's speed is another one minutes later: median and quartiles; a dash without one.
    """

    def show(row: Row) -> str:
        group = [r for r in rows if row.get("groups", 1) == 1 or r.get("group", 1) == row["group"]]
        peers = [times(r) for r in group if r["arm"].startswith(PEERS[peer])]
        return quartiles(min(peers, key=np.median) / times(row), ".2f") if peers else "-"

    return show


def _peers(rows: list[Row]) -> list[str]:
    """Those of `PEERS` that some rows are of."""
    return [peer for peer, begin in PEERS.items() if any(row["arm"].startswith(begin) for row in rows)]


def _policy(row: Row) -> str:
    """Time of a policy that looks at tokens, and its share of a step; a dash for a fixed one."""
    policy = row.get("policy_ms")
    return "-" if policy is None else f"{policy:.3f} ms, {100 * policy / row['ms_per_token']:.1f} %"


def _attention(row: Row) -> str:
    """Bandwidth of attention alone and its part of a plain read's; a dash where it was not measured."""
    measured = "attention_of_read" in row
    return f"{row['attention_gb_per_s']:.1f} GB/s, {row['attention_of_read']:.2f}" if measured else "-"


def step_table(rows: list[Row]) -> list[str]:
    """A Markdown table of decode steps at one shape, context and number of threads, fastest first."""
    columns: Columns = {
        "arm": lambda row: _group(row, row["arm"]),
        **STEP,
        **{f"{peer} / arm": _beside(rows, peer, _step_times) for peer in _peers(rows)},
        "policy / step": _policy,
        **SPEED,
        "attention / read": _attention,
        **MEMORY,
    }
    return markdown(columns, sorted(rows, key=lambda row: row["ms_per_token"]))


def prefill_table(rows: list[Row]) -> list[str]:
    """A Markdown table of how fast prompts are read, of one shape, context and number of threads, fastest first."""
    columns: Columns = {
        "arm": lambda row: _group(row, row["arm"]),
        "prefill tokens/s": lambda row: quartiles(row["context"] / _prefill_times(row), ".0f"),
        **{f"arm / {peer}": _beside(rows, peer, _prefill_times) for peer in _peers(rows)},
        "times": lambda row: str(len(row["prefill_seconds"])) if "prefill_seconds" in row else "-",
    }
    return markdown(columns, sorted(rows, key=lambda row: -row["prefill_tokens_per_s"]))


def _settings(row: Row) -> str:
    """What an arm was."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    what = f"{row['backend']}, {row['settings']} ({versions}); compared with {row['check_reference']}"
    return f"* **{row['arm']}**: {what}"


def page(files: list[tuple[str, list[Row]]], folder: Path) -> str:
    """The page.

    Args:
        files: name and rows of each JSON file.
        folder: where plots are written; their links are relative to it.
    """
    lines = [INTRODUCTION]
    newest: dict[tuple[str, int, int], str] = {}  # shape, threads, context -> version of kvq
    small_first = sorted(files, key=lambda file: file[1][0]["weight_bytes"])
    for name, rows in sorted(small_first, key=lambda file: file[1][0]["run"]["date"], reverse=True):
        about = rows[0]["run"]
        run, version = (rows[0]["shape"], rows[0]["threads"]), about["versions"]["kvq"]
        bandwidth, idle = (max(row[key] for row in rows) for key in ("bandwidth_gb_per_s", "idle_cpu_share"))
        write_plot(rows, folder / f"{name}.png")
        lines += [
            f"## {run[0]}, {run[1]} threads of {about['cpu']}, kvq {version}, {about['date']}",
            "",
            f"A step reads {rows[0]['weight_bytes'] / 1e6:.0f} MB of weights."
            f" {about['cpu']}, {about['cores']} cores ({', '.join(about['instructions'])}), {about['memory_gb']} GB,"
            f" {about['system']}. Memory read at up to {bandwidth:.1f} GB/s. Idle arms took at most"
            f" {100 * idle:.1f} % of a core.",
            "",
            f"![ms per token against cached tokens]({name}.png)",
            "",
        ]
        contexts = sorted({row["context"] for row in rows})
        again = [n for n in contexts if newest.setdefault((*run, n), version) != version]
        if again:
            lengths = " and ".join(map(str, again))
            lines += [f"At {lengths} tokens a newer version was measured, above; these are in {name}.json.", ""]
        for context in [n for n in contexts if n not in again]:
            at = [row for row in rows if row["context"] == context]
            lines += [f"### {context} cached tokens", "", *step_table(at), "", *prefill_table(at), ""]
        if any(row.get("groups", 1) > 1 for row in rows):
            short = "Not all arms fit into memory together: they ran in groups, and the first arm ran in every one."
            lines += [short, ""]
        lines += ["Arms:", "", *map(_settings, {row["arm"]: row for row in rows}.values()), ""]
        if skipped := about["skipped"]:
            lines += ["Skipped:", "", *(f"* **{arm}**: {reason}" for arm, reason in skipped.items()), ""]
    return "\n".join(lines)
