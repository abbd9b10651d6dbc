"""An inspection as a picture: precision and features along the text, readable without colour."""

from __future__ import annotations

import warnings
from io import BytesIO

from kvq.runtime.inspect.records import Inspection
from kvq.runtime.inspect.views.panels import about, means, panels, run_length
from kvq.runtime.text.cells import visible

LABELLED = 48  # longest text, in tokens, whose tokens are written below the axis


def png(inspection: Inspection) -> bytes:
    """A PNG with a panel for the bits and one for each feature there is (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens, stats = inspection.tokens, inspection.stats
    drawn, count = panels(tokens), len(tokens)
    edges, run = range(count + 1), run_length(count)
    window = sum(token.in_window for token in tokens)
    figure, axes = pyplot.subplots(len(drawn), figsize=(11, 1 + 1.6 * len(drawn)), sharex=True, squeeze=False)
    for axis, panel in zip(axes[:, 0], drawn, strict=True):
        axis.set(ylim=(panel.low, panel.high), xlim=(0, count))
        axis.set_title(panel.title, loc="left", fontsize=9)
        if run > 1 and len(panel.series) == 1:
            axis.stairs(panel.series[0], edges, baseline=None, color="0.75", linewidth=0.5)
        axis.stairs(means(panel.series[0], run), edges, baseline=None, color="black", linewidth=1.1)
        for area in panel.series[1:]:
            axis.stairs(means(area, run), edges, baseline=panel.low, fill=True, color="0.75")
        if panel.logarithmic:
            axis.set_yscale("log")
            axis.minorticks_off()
        axis.set_yticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axis.grid(True, axis="y", linewidth=0.4)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if window:
            axis.axvspan(count - window, count, facecolor="none", edgecolor="0.7", hatch="//", linewidth=0)
    bottom = axes[-1, 0]
    if count <= LABELLED:
        labels = [visible(token.text).replace("\n", "\u21b5").replace("\t", "\u21e5") for token in tokens]
        bottom.set_xticks([i + 0.5 for i in range(count)], labels, rotation=90, fontsize=8, parse_math=False)
    notes = [about(count), "Hatched: the recent window, still protected." if window else ""]
    bottom.set_xlabel(" ".join(["Token.", *filter(None, notes)]))
    title = f"{inspection.model}, {stats.policy_text}: {stats.tokens} tokens, {stats.kv_bits or 0:.2f} bits per value"
    figure.suptitle(visible(title), parse_math=False, fontsize=10)
    file = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script the font lacks is drawn as boxes
        figure.tight_layout()
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
    return file.getvalue()
