"""Rows of the decode benchmark as a plot."""

from __future__ import annotations

from pathlib import Path

from kvq.bench.report.tables import Row

STYLES, MARKERS, GREYS = ("-", "--", "-.", ":"), "osD^vP*X<>hd", ("0.0", "0.35", "0.55")


def write_plot(rows: list[Row], file: Path) -> None:
    """Milliseconds per token against context, both logarithmic: each arm a marker and a line style of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    families = list(dict.fromkeys(row["arm"].split("-")[0] for row in rows))
    for i, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        first = {r["context"]: r for r in reversed(rows) if r["arm"] == arm}  # its first group, where it is in several
        family = families.index(arm.split("-")[0])
        axes.plot(
            sorted(first),
            [first[context]["ms_per_token"] for context in sorted(first)],
            linestyle=STYLES[family % len(STYLES)],
            marker=MARKERS[i % len(MARKERS)],
            color=GREYS[family % len(GREYS)],
            markerfacecolor=None if arm.startswith("kvq-") else "white",
            label=arm,
        )
    axes.set(yscale="log", xlabel="cached tokens", ylabel="ms per token")
    axes.set_xscale("log", base=2)
    contexts = sorted({r["context"] for r in rows})
    axes.set_xticks(contexts, [str(c) for c in contexts])
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:g}")
    axes.set_title(f"{rows[0]['shape']}, {rows[0]['threads']} threads, {rows[0]['run']['cpu']}")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
