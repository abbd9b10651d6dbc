"""Tables from the JSON of `kvq eval pareto`, `needle`, `tasks` and `paper-table`, and a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kvq.controller.evaluation.pareto import compare

# Told apart without colour: each arm has a marker, a line style and a grey of its own.
STYLES = {
    "static": ("s", "--", "0.35"),
    "rule": ("^", "-.", "0.35"),
    "random": ("x", ":", "0.35"),
    "shuffled": ("v", ":", "0.6"),
    "paper": ("D", "--", "0.6"),
    "adaptive": ("o", "-", "0"),
    "oracle": ("*", "-.", "0.6"),
}
ORDER = ("fp16", "int8", "k8v4", "int4", "k4v2", "int3", "int2", "static", "rule", "random", "shuffled", "paper",
         "adaptive", "oracle")  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: per context the arms, the paired differences, and the way from random to the oracle."""
    parts: list[str] = []
    for context in sorted({row["context"] for row in rows}):
        here = [row for row in rows if row["context"] == context]
        parts.append(f"### Context {context}, {here[0]['texts']} texts\n\n{_arms(here)}\n")
        if any(row["arm"] == "adaptive" for row in here):
            parts.append(f"{_differences(here)}\n")
        if any(row["arm"] == "oracle" for row in here):
            parts.append(f"{_closed(here)}\n")
    return "\n".join(parts)


def _arms(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| arm | bits asked | bits used | with free room | KL mean | KL p99 | same top-1 | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["bits_requested"] or 0, ORDER.index(r["arm"]))):
        used = f"{row['bits_mean']:.3f} | {row['bits_with_slack']:.3f}"
        asked = "" if row["bits_requested"] is None else f"{row['bits_requested']:g}"
        lines.append(
            f"| {row['arm']} | {asked} | {used} | {row['kld_mean']:.5f} |"
            f" {row['kld_p99']:.4f} | {row['top1']:.2%} | {row['perplexity']:.3f} |"
        )
    return "\n".join(lines)


def _differences(rows: list[dict[str, Any]]) -> str:
    lines = [
        "KL of the other arm minus that of `adaptive`, paired over texts, 95 % bootstrap interval:",
        "",
        "| bits | arm | difference | interval | factor |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(compare(rows), key=lambda r: (r["bits_requested"], ORDER.index(r["arm"]))):
        mark = "" if row["low"] > 0 or row["high"] < 0 else " (zero within)"
        lines.append(
            f"| {row['bits_requested']:g} | {row['arm']} | {row['difference']:+.5f} |"
            f" {row['low']:+.5f} to {row['high']:+.5f}{mark} | {row['factor']:.2f} |"
        )
    return "\n".join(lines)


def _closed(rows: list[dict[str, Any]]) -> str:
    found = {(row["arm"], row["bits_requested"]): row["kld_mean"] for row in rows}
    lines = [
        "Share of the way from an arm to the oracle, in log KL, that `adaptive` goes:",
        "",
        "| bits | from random | from shuffled | from static |",
        "|---|---|---|---|",
    ]
    for bits in sorted({bits for _, bits in found if bits is not None}):
        cells = []
        for arm in ("random", "shuffled", "static"):
            whole = math.log(found[arm, bits] / found["oracle", bits])
            cells.append(f"{math.log(found[arm, bits] / found['adaptive', bits]) / whole:.0%}")
        lines.append(f"| {bits:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def needle_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each arm of `kvq eval needle` found again, by kind and length."""
    lines = [
        "| kind | tokens | arm | bits used | log-likelihood | difference to 16 bits | hits | kept of 16 bits' hits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        arm = row["arm"] + (f" at {row['kv_bits']:g}" if "kv_bits" in row else "")
        beside, kept = row.get("loglik_difference"), row.get("kept")
        difference = f"{beside['mean']:+.2f} ({beside['low']:+.2f} to {beside['high']:+.2f})" if beside else ""
        share = f"{kept['mean']:.0%} ({kept['low']:.0%} to {kept['high']:.0%})" if kept else ""
        lines.append(
            f"| {row['kind']} | {row['tokens'] or 'all'} | {arm} | {row['bits']:.2f} | {row['loglik']:.2f} |"
            f" {difference} | {row['hits']:.0%} | {share} |"
        )
    return "\n".join(lines)


def task_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each model and arm accuracy by task and milliseconds by cached tokens, as far as they were measured.

    Args:
        rows: of `kvq eval tasks` and `kvq eval paper-table`.
    """
    parts = []
    for model in dict.fromkeys(row.get("model") for row in rows):
        here = [row for row in rows if row.get("model") == model]
        heads = ["arm", *dict.fromkeys(_head(row) for row in here)]
        cells: dict[str, dict[str, str]] = {}  # arm -> heading -> cell
        for row in here:
            arm = row["arm"] + (f" at {row['kv_bits']:g}" if "kv_bits" in row else "")
            cells.setdefault(arm, {"arm": arm})[_head(row)] = _accuracy(row) if "acc" in row else _step(row)
        lines = [[of_arm.get(head, "") for head in heads] for of_arm in cells.values()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))
        parts.append(f"### {model}\n\n{table}" if model else table)
    return "\n\n".join(parts)


def _head(row: dict[str, Any]) -> str:
    """The column that a row's cell stands in."""
    return f"{row['task']}, bits" if "acc" in row else f"ms behind {row['cached']:,}"


def _accuracy(row: dict[str, Any]) -> str:
    """acc / acc_norm in %, in brackets the paired interval of acc's difference to the first arm, points; bits used."""
    beside = row.get("acc_difference")
    interval = f" ({100 * beside['low']:+.1f} to {100 * beside['high']:+.1f})" if beside else ""
    return f"{100 * row['acc']:.1f} / {100 * row['acc_norm']:.1f}{interval}, {row['bits']:.1f}"


def _step(row: dict[str, Any]) -> str:
    """Milliseconds, and of all arms but the first the time over the first one's, in brackets its quartiles."""
    beside = row.get("of_first")
    ratio = f", {beside['median']:.2f} ({beside['low']:.2f} to {beside['high']:.2f})" if beside else ""
    return f"{row['ms']:.1f}{ratio}"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Mean KL against bits used, one panel per context, arms of fixed precision as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({row["context"] for row in rows})
    figure, panels = pyplot.subplots(1, len(contexts), figsize=(6 * len(contexts), 4.5), squeeze=False, sharey=True)
    for panel, context in zip(panels[0], contexts, strict=True):
        here = [row for row in rows if row["context"] == context]
        for arm in ORDER:
            points = sorted((r["bits_mean"], r["kld_mean"]) for r in here if r["arm"] == arm and r["bits_requested"])
            if points:
                marker, line, grey = STYLES[arm]
                width, face = (2.2, grey) if arm == "adaptive" else (1.1, "white")
                panel.plot(
                    *zip(*points, strict=True), marker=marker, markersize=8, markerfacecolor=face, linestyle=line,
                    color=grey, label=arm, linewidth=width,
                )  # fmt: skip
        for row in here:
            if row["bits_requested"] is None and row["kld_mean"] > 0 and row["bits_mean"] < 7:
                panel.plot(row["bits_mean"], row["kld_mean"], "k+")
                place = {"xytext": (5, 4), "textcoords": "offset points"}
                panel.annotate(row["arm"], (row["bits_mean"], row["kld_mean"]), fontsize=8, **place)
        panel.set(title=f"context {context}", xlabel="total bits per value", yscale="log")
        panel.margins(x=0.08)
        panel.grid(True, which="both", alpha=0.3)
    panels[0][0].set_ylabel("KL to 16 bits, nats a token")
    panels[0][-1].legend(handlelength=4)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
