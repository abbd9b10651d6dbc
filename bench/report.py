"""Rows of the decode benchmark as a page of the documentation.

    python -m kvq.bench.report decode.json [more.json ...] -o docs/performance.md

Speeds are given next to the fastest onnxruntime and the fastest llama.cpp arm of the same run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvq.bench.table import write_plot
from kvq.runtime.files import write_atomically

NEEDED = ("arm", "shape", "context", "threads", "ms_per_token", "prefill_tokens_per_s", "kv_bytes", "peak_rss_bytes")
PEERS = ("ort-gqa-", "llama-")

INTRODUCTION = """# Performance

Time of one decode step against the number of cached tokens, kvq next to other runtimes on the same machine. This page
is written by `python -m kvq.bench.report` from measurements of `python -m kvq.bench.decode`.

How it is measured:

* All arms run the same random weights of a SmolLM's shape: int4 layers in blocks of 64 with int8 activations, embedding
  and head in 8 bits (one scale a row in OpenVINO); transformers runs their float32 values.
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
  the same arrays in as many threads (`kvq.bench.attention`).
"""


def beside(row: dict[str, Any], others: list[dict[str, Any]], times: Callable[[dict[str, Any]], np.ndarray]) -> str:
    """How many times as long as an arm the fastest of some others takes, turn by turn, since the machine's speed is
    another one minutes later: median and quartiles; a dash without one.
    """
    if not others:
        return "-"
    fastest = min(others, key=lambda other: float(np.median(times(other))))
    return quartiles(times(fastest) / times(row), ".2f")


def step_times(row: dict[str, Any]) -> np.ndarray:
    """Milliseconds of a step in each turn; their median alone in files of before turns were kept."""
    return np.array(row.get("burst_ms", [row["ms_per_token"]]))


def beside_read(row: dict[str, Any]) -> str:
    """Bandwidth of attention alone and its part of a plain read's; a dash where it was not measured."""
    if "attention_of_read" not in row:
        return "-"
    return f"{row['attention_gb_per_s']:.1f} GB/s, {row['attention_of_read']:.2f}"


def policy_time(row: dict[str, Any]) -> str:
    """Time of a learned or rule-based policy, and its share of a step; a dash for a fixed one."""
    if "policy_ms" not in row:
        return "-"
    return f"{row['policy_ms']:.3f} ms, {100 * row['policy_ms'] / row['ms_per_token']:.1f} %"


def same_group(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that took turns with this one."""
    return [r for r in rows if r.get("group", 1) == row.get("group", 1)] if row.get("groups", 1) > 1 else rows


def peers_in(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each kind of peer."""
    return [[row for row in rows if row["arm"].startswith(prefix)] for prefix in PEERS]


def arm_name(row: dict[str, Any]) -> str:
    """The arm, and its group where there are several."""
    return row["arm"] + (f" (group {row['group']})" if row.get("groups", 1) > 1 else "")


def prefill_times(row: dict[str, Any]) -> np.ndarray:
    """Seconds of each turn; of the median alone in files of before turns were kept."""
    return np.array(row.get("prefill_seconds", [row["context"] / row["prefill_tokens_per_s"]]))


def quartiles(values: np.ndarray, form: str) -> str:
    """Median, and in brackets 25th and 75th percentile where there is more than one value."""
    low, median, high = (format(x, form) for x in np.percentile(values, [25, 50, 75]))
    return f"{median} ({low} - {high})" if len(values) > 1 else median


def prefill_table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of how fast prompts are read, of one shape, context and number of threads, fastest first."""
    lines = ["| arm | prefill tokens/s | arm / ort-gqa | arm / llama | times |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: -r["prefill_tokens_per_s"]):
        same = same_group(row, rows)
        speeds = row["context"] / prefill_times(row)
        ratios = [beside(row, peers, prefill_times) for peers in peers_in(same)]
        times = str(len(speeds)) if "prefill_seconds" in row else "-"
        cells = [arm_name(row), quartiles(speeds, ".0f"), *ratios, times]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of one shape, context and number of threads, fastest first."""
    lines = [
        "| arm | ms/token | spread | ort-gqa / arm | llama / arm | policy / step | floor ms | x floor | GB/s |"
        " attention / read | KV MB | peak MB | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r["ms_per_token"]):
        same = same_group(row, rows)
        ratios = [beside(row, peers, step_times) for peers in peers_in(same)]
        cells = [
            arm_name(row),
            f"{row['ms_per_token']:.2f}",
            f"{row['ms_p25']:.2f} - {row['ms_p75']:.2f}",
            *ratios,
            policy_time(row),
            f"{row['floor_ms']:.2f}",
            f"{row['over_floor']:.2f}",
            f"{row['gb_per_s']:.1f}",
            beside_read(row),
            f"{row['kv_bytes'] / 1e6:.1f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['check_difference']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def settings(rows: list[dict[str, Any]]) -> list[str]:
    """What each arm was, a line each."""
    lines = []
    for row in {row["arm"]: row for row in rows}.values():
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        lines.append(
            f"* **{row['arm']}**: {row['backend']}, {row['settings']} ({versions}); compared with"
            f" {row['check_reference']}"
        )
    return lines


def page(files: list[tuple[str, list[dict[str, Any]]]], folder: Path) -> str:
    """The page.

    Args:
        files: name and rows of each JSON file.
        folder: where plots are written; their links are relative to it.
    """
    lines = [INTRODUCTION]
    for name, rows in sorted(files, key=lambda file: file[1][0]["weight_bytes"]):  # small models first
        first, about = rows[0], rows[0]["run"]
        lines += [f"## {first['shape']}, {first['threads']} threads", ""]
        lines += [
            f"{about['cpu']}, {about['cores']} cores ({', '.join(about['instructions'])}), {about['memory_gb']} GB,"
            f" {about['system']}; {about['date']}. Memory read at up to"
            f" {max(row['bandwidth_gb_per_s'] for row in rows):.1f} GB/s. Idle arms took at most"
            f" {100 * max(row['idle_cpu_share'] for row in rows):.1f} % of a core.",
            "",
        ]
        plot = folder / f"{name}.png"
        write_plot(rows, plot)
        lines += [f"![ms per token against cached tokens]({plot.name})", ""]
        for context in sorted({row["context"] for row in rows}):
            lines += [f"### {context} cached tokens", ""]
            at = [row for row in rows if row["context"] == context]
            lines += [*table(at), "", *prefill_table(at), ""]
        if any(row.get("groups", 1) > 1 for row in rows):
            lines += [
                "Not all arms fit into memory together: they ran in groups, and the first arm ran in every one.",
                "",
            ]
        lines += ["Arms:", "", *settings(rows), ""]
        if skipped := about["skipped"]:
            lines += ["Skipped:", "", *(f"* **{arm}**: {reason}" for arm, reason in skipped.items()), ""]
    return "\n".join(lines)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of one JSON file of the decode benchmark.

    Raises:
        ValueError: it is not one; the message is one line.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "run" in r for r in rows):
        raise ValueError(f"{file} holds no rows; give a file written by python -m kvq.bench.decode --json")
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise ValueError(f"a row of {file} has no {missing[0]}; measure again with this version")
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", default="docs/performance.md", show_default=True, type=click.Path(path_type=Path), help="The page."
)
def main(files, out) -> None:
    """Write a page about the JSON FILES of the decode benchmark; plots go beside it."""
    try:
        read = [(file.stem, read_rows(file)) for file in files]
        text = page(read, out.absolute().parent)
        write_atomically(out, text)
    except ValueError as error:
        click.echo(f"kvq.bench.report: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"kvq.bench.report: {error.filename} cannot be written ({error.strerror})", err=True)
        sys.exit(1)
    click.echo(f"{out}: {sum(len(rows) for _, rows in read)} rows", err=True)


if __name__ == "__main__":
    main()
