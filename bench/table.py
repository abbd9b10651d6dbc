"""Rows of the decode benchmark as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# (heading, how a row shows it)
COLUMNS: list[tuple[str, Any]] = [
    ("arm", lambda r: r["arm"]),
    ("context", lambda r: f"{r['context']}"),
    ("ms/token", lambda r: f"{r['ms_per_token']:.2f}"),
    ("p25 - p75", lambda r: f"{r['ms_p25']:.2f} - {r['ms_p75']:.2f}"),
    ("floor ms", lambda r: f"{r['floor_ms']:.2f}"),
    ("x floor", lambda r: f"{r['over_floor']:.2f}"),
    ("GB/s", lambda r: f"{r['gb_per_s']:.1f}"),
    ("attention", lambda r: f"{r['attention_gb_per_s']:.1f}" if "attention_gb_per_s" in r else ""),
    ("of read", lambda r: f"{r['attention_of_read']:.2f}" if "attention_of_read" in r else ""),
    ("policy ms", lambda r: f"{r['policy_ms']:.3f}" if "policy_ms" in r else ""),
    ("prefill/s", lambda r: f"{r['prefill_tokens_per_s']:.0f}"),
    ("KV MB", lambda r: f"{r['kv_bytes'] / 1e6:.1f}"),
    ("peak MB", lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}"),
    ("difference", lambda r: f"{r['check_difference']:.1e}"),
    ("backend", lambda r: r["backend"] + (f" (group {r['group']})" if r["groups"] > 1 else "")),
]


def decode_table(rows: list[dict[str, Any]]) -> str:
    """A table for a terminal, with a line on what was measured."""
    cells = [[heading for heading, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    last = len(COLUMNS) - 1

    def aligned(line: list[str]) -> str:
        parts = [
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    first = rows[0]
    bandwidth = max(row["bandwidth_gb_per_s"] for row in rows)
    idle = max(row["idle_cpu_share"] for row in rows)
    note = (
        f"{first['shape']}, {first['threads']} threads, median of {min(row['steps'] for row in rows)} steps;"
        f" memory read at {bandwidth:.1f} GB/s; difference: of logits from those of the reference on numpy;"
        f" idle arms took {100 * idle:.1f} % of a core"
    )
    return "\n".join([*(aligned(line) for line in cells), note])


def write_plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds per token against context, both logarithmic: each arm a marker and a line style of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    styles, markers, greys = ["-", "--", "-.", ":"], "osD^vP*X<>hd", ["0.0", "0.35", "0.55"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    families = list(dict.fromkeys(arm.split("-")[0] for arm in arms))
    for i, arm in enumerate(arms):
        first = {r["context"]: r for r in reversed(rows) if r["arm"] == arm}  # its first group, where it is in several
        mine = [first[context] for context in sorted(first)]
        family = families.index(arm.split("-")[0])
        axes.plot(
            [r["context"] for r in mine],
            [r["ms_per_token"] for r in mine],
            linestyle=styles[family % len(styles)],
            marker=markers[i % len(markers)],
            color=greys[family % len(greys)],
            markerfacecolor=None if arm.startswith("kvq-") else "white",
            label=arm,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({r["context"] for r in rows})
    axes.set_xticks(contexts, [str(c) for c in contexts])
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:g}")
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("ms per token")
    axes.set_title(f"{rows[0]['shape']}, {rows[0]['threads']} threads, {rows[0]['run']['cpu']}")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
