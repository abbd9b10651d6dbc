"""Tables from the JSON of `kvq eval pareto`, `kld`, `needle`, `tasks` and `paper-table`, and a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kvq.controller.evaluation.paired import FEWEST
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
OVER = 0.3  # bits per value that an arm may take beyond its budget without a word about it
NEEDLE_FORMS = {"loglik_difference": "+.2f", "kept": ".0%"}
# What the cells of a table of tasks and times say, by what their rows have.
LEGENDS = {
    "acc": "Tasks: acc / acc_norm in %, in brackets the paired 95 % interval of acc's difference to the first arm in"
    " points, bits used.",
    "cached": "Times: ms of a step, and over that of the first arm in the same round: median (quartiles), so not always"
    " the quotient of the two ms.",
}


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
        interval = f"{row['low']:+.5f} to {row['high']:+.5f}{mark}"
        if (texts := rows[0]["texts"]) < FEWEST:
            interval = f"none: n = {texts}, fewer than {FEWEST} texts"
        lines.append(
            f"| {row['bits_requested']:g} | {row['arm']} | {row['difference']:+.5f} | {interval} |"
            f" {row['factor']:.2f} |"
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


def kld_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: per context the arms of `kvq eval kld` over whole texts, and their mean KL by position if there is more
    than one part."""
    parts = []
    for context in sorted({row["context"] for row in rows}):
        arms = _placed([row for row in rows if row["context"] == context])
        whole = [arm[0, context] for arm in arms]
        parts.append(f"### Context {context}, {whole[0]['tokens'] // context} texts\n\n{_whole(whole)}")
        spans = sorted(set().union(*arms) - {(0, context)})
        if spans:
            parts.append(f"KL mean by position in the text:\n\n{_spans(arms, spans, context)}")
    parts.append(
        "KL to the 16-bit cache in nats a token, a peer's to its own; bits per value are those of the whole text."
    )
    return "\n\n".join(parts)


def _placed(rows: list[dict[str, Any]]) -> list[dict[tuple[int, int], dict[str, Any]]]:
    """Each arm's rows by their positions, as they were written: an arm's begin with that of the whole text."""
    arms: list[dict[tuple[int, int], dict[str, Any]]] = []
    for row in rows:
        start, stop = row["positions"]
        whole = (start, stop) == (0, row["context"])
        if whole and not (arms and row == arms[-1][start, stop]):  # a text of one part has the same row again
            arms.append({})
        arms[-1][start, stop] = row
    return arms


def _whole(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | bits used | KL mean | KL p99 | same top-1 | perplexity |", "|---|---|---|---|---|---|"]
    for row in rows:
        bits = f"{row['bits']:.2f}" if "bits" in row else ""  # older files have none
        lines.append(
            f"| {_arm(row)} | {bits} | {row['kld_mean']:.5f} | {row['kld_p99']:.4f} | {row['top1']:.2%} |"
            f" {row['perplexity']:.3f} |"
        )
    return "\n".join(lines)


def _spans(arms: list[dict[tuple[int, int], dict[str, Any]]], spans: list[tuple[int, int]], context: int) -> str:
    heads = ["arm", *(f"{start} to {stop - 1}" for start, stop in spans)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for arm in arms:
        cells = [f"{arm[span]['kld_mean']:.5f}" if span in arm else "" for span in spans]
        lines.append(f"| {' | '.join([_arm(arm[0, context]), *cells])} |")
    return "\n".join(lines)


def _arm(row: dict[str, Any]) -> str:
    """Name and budget of a row's arm."""
    return row["arm" if "arm" in row else "policy"] + (f" at {row['kv_bits']:g}" if "kv_bits" in row else "")


def _between(low: str, high: str, units: int) -> str:
    """An interval in brackets, or of how few units there is none."""
    return f"({low} to {high})" if units >= FEWEST else f"(n = {units})"


def _remarks(rows: list[dict[str, Any]], units: str) -> list[str]:
    """What has to be said below a table of rows, each with how many units it is of."""
    said = []
    if any(row[units] < FEWEST for row in rows if units in row and row.keys() & {"acc_difference", "kept"}):
        said.append(f"n: so few {units} have no interval; it takes {FEWEST}.")
    if any(row["bits"] > row["kv_bits"] + OVER for row in rows if "kv_bits" in row):
        said.append("Short texts may take more than a budget: docs/guide.md#policies-and-budgets.")
    return said


def needle_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each arm of `kvq eval needle` found again, by kind and length."""
    lines = [
        "| kind | tokens | arm | bits used | log-likelihood | difference to 16 bits | hits | kept of 16 bits' hits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside, kept = (_mean(row.get(name), form, row["documents"]) for name, form in NEEDLE_FORMS.items())
        lines.append(
            f"| {row['kind']} | {row['tokens'] or 'all'} | {_arm(row)} | {row['bits']:.2f} | {row['loglik']:.2f} |"
            f" {beside} | {row['hits']:.0%} | {kept} |"
        )
    return "\n\n".join(["\n".join(lines), *_remarks(rows, "documents")])


def _mean(found: dict[str, float] | None, form: str, units: int) -> str:
    """A mean with its interval; nothing if there is none."""
    if not found:
        return ""
    mean, low, high = (format(found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} {_between(low, high, units)}"


def task_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each model and arm accuracy by task and milliseconds by cached tokens, as far as they were measured,
    and what the cells say.

    Args:
        rows: of `kvq eval tasks` and `kvq eval paper-table`.
    """
    parts = []
    for model in dict.fromkeys(row.get("model") for row in rows):
        here = [row for row in rows if row.get("model") == model]
        heads = ["arm", *dict.fromkeys(_head(row) for row in here)]
        cells: dict[str, dict[str, str]] = {}  # arm -> heading -> cell
        for row in here:
            arm = _arm(row)
            cells.setdefault(arm, {"arm": arm})[_head(row)] = _accuracy(row) if "acc" in row else _step(row)
        lines = [[of_arm.get(head, "") for head in heads] for of_arm in cells.values()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))
        parts.append(f"### {model}\n\n{table}" if model else table)
    legends = [text for column, text in LEGENDS.items() if any(column in row for row in rows)]
    return "\n\n".join([*parts, *legends, *_remarks(rows, "items")])


def _head(row: dict[str, Any]) -> str:
    """The column that a row's cell stands in."""
    return f"{row['task']}, bits" if "acc" in row else f"ms behind {row['cached']:,}"


def _accuracy(row: dict[str, Any]) -> str:
    """acc / acc_norm in %, in brackets the paired interval of acc's difference to the first arm, points; bits used."""
    interval = ""
    if beside := row.get("acc_difference"):
        low, high = (f"{100 * beside[name]:+.1f}" for name in ("low", "high"))
        interval = f" {_between(low, high, row['items'])}"
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
