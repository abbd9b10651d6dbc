"""An inspection as an HTML report that loads nothing, runs no script and prints in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvq.runtime.inspect.records import InspectedToken, Inspection
from kvq.runtime.inspect.views.palette import ON_DARK, ON_LIGHT, Color, ink, level, shade, shown_bits
from kvq.runtime.inspect.views.panels import about as about_means
from kvq.runtime.inspect.views.panels import svg
from kvq.runtime.policy.base import FEATURE_NAMES
from kvq.runtime.precision.table import Pair
from kvq.runtime.session.statistics import size
from kvq.runtime.text.cells import visible

TITLES = {
    "entropy": "entropy, nats",
    "rarity": "rarity, nats",
    "attention_variance": "attention variance",
    "confidence": "confidence",
}
# Nothing is loaded from anywhere and no script runs, whatever the text says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --faint: #595959; --line: #c8c8c8; --bar: #555; }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 58rem; padding: 1.5rem 1.25rem 6rem; }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; }
.about { color: var(--faint); }
.text { font: 1.05rem/2.35 Georgia, "Noto Serif", serif; overflow-wrap: anywhere; tab-size: 4; white-space: pre-wrap; }
.t { background: var(--shade); border-bottom: var(--height) solid var(--bar);
  color: var(--on); margin-right: 1px; padding: .12em 0; }
.t:hover { outline: 2px solid var(--ink); }
.w { border-top: 2px dashed var(--bar); }
.n { opacity: .6; }
.t:hover::after { background: var(--ink); bottom: 0; color: var(--ground); content: attr(data-tip);
  font: .95rem/1.6 system-ui, sans-serif; left: 0; padding: .6rem 1.25rem; position: fixed; right: 0;
  white-space: pre-wrap; z-index: 1; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--faint); font-weight: normal; }
.total td { border-bottom: 0; font-weight: bold; }
.scroll { overflow-x: auto; }
.all td { white-space: pre; }
summary { cursor: pointer; }
svg { display: block; height: auto; width: 100%; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
svg .title { fill: var(--ink); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke: var(--ink); stroke-width: 1.2; }
svg .single { opacity: .35; stroke-width: .6; }
svg .area { fill: var(--ink); opacity: .28; }
svg .window { fill: var(--ink); opacity: .07; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141414; --ink: #ececec; --faint: #a8a8a8; --line: #444; --bar: #b4b4b4; }
}
@media print {
  :root { --ground: #fff; --ink: #000; --faint: #444; --line: #aaa; --bar: #000; }
  body { max-width: none; padding: 0; }
  .t { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .t, tr, svg { break-inside: avoid; }
}
"""


def html(inspection: Inspection) -> str:
    """The report. Every piece of the text in it is made visible first and escaped then."""
    stats = inspection.stats
    pairs = sorted({token.chosen for token in inspection.tokens}, reverse=True)
    name, policy = (escape(visible(part)) for part in (inspection.model, stats.policy_text))
    about = [
        f"model {name}, {policy}",
        f"{stats.tokens:,} tokens in {size(stats.kv_nbytes)}",
        f"{stats.kv_bits or 0:.2f} bits per value, all told",
    ]
    featured = all(token.features for token in inspection.tokens)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>kvq inspect: {stats.tokens} tokens, {policy}</title>",
            f"<style>{STYLE}{shades(pairs)}</style></head><body>",
            "<h1>Bits of every token</h1>",
            f'<p class="about">{". ".join(about)}.</p>',
            "<h2>Totals by precision</h2>",
            _totals(inspection),
            "<h2>Text</h2>",
            f'<p class="about">{_reading(inspection)}</p>',
            f'<div class="text" dir="auto">{"".join(map(_cell, inspection.cells()))}</div>',
            "<h2>Along the text</h2>",
            f'<p class="about">{averaged}</p>' if (averaged := about_means(stats.tokens)) else "",
            svg(inspection.tokens),
            "<h2>All tokens</h2>",
            _every_token(inspection, featured),
            "</body></html>",
            "",
        ]
    )


def shades(pairs: Sequence[Pair]) -> str:
    """Styles of pairs by their names as classes: shade and height of the bar, in light, dark and print."""

    def rules(ramp: Sequence[Color]) -> str:
        parts = []
        for bits in pairs:
            ground = shade(bits, ramp)
            height = f"{1 + 7 * level(bits):.0f}px"
            parts.append(f".{bits} {{ --shade: {_hex(ground)}; --on: {_hex(ink(ground))}; --height: {height}; }}")
        return "\n".join(parts)

    light = rules(ON_LIGHT)
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{rules(ON_DARK)}\n}}\n"


def _hex(color: Color) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)


def _reading(inspection: Inspection) -> str:
    stats = inspection.stats
    parts = ["The shade of a token and the height of the bar below it follow its bits; point at it to read all of it."]
    if stats.recent:
        parts.append(
            f"A dashed line above: one of the newest {stats.recent}, still at {stats.protect_bits} bits; its shade is"
            " what it will be stored at. The plots have them on grey."
        )
    if any(len({token.chosen for token in cell}) > 1 for cell in inspection.cells()):
        parts.append("A character spread over several tokens has the shade of the lowest.")
    return " ".join(parts)


def _totals(inspection: Inspection) -> str:
    rows = []
    for total in inspection.totals:
        if not total.tokens and not total.due:
            continue
        sample = f'<span class="t {total.bits}">&nbsp;{total.precision}&nbsp;</span>' if total.bits else "recent window"
        due = f"{total.due:,}" if total.bits else ""
        bits = "" if total.bits_per_value is None else f"{total.bits_per_value:.2f}"
        rows.append(_row([sample, f"{total.tokens:,}", due, f"{total.nbytes:,}", bits]))
    stats = inspection.stats
    slack = sum(total.slack_nbytes for total in inspection.totals)
    rows.append(_row(["free room of pages", "", "", f"{slack:,}", ""]))
    whole = ["all", f"{stats.tokens:,}", "", f"{stats.kv_nbytes:,}", f"{stats.kv_bits or 0:.2f}"]
    head = _row(["keys and values", "stored", "due from the window", "bytes", "bits per value"], "th")
    return f'<div class="scroll"><table>{head}{"".join(rows)}{_row(whole, kind="total")}</table></div>'


def _row(fields: Sequence[str], tag: str = "td", kind: str = "") -> str:
    """A table row; the fields are HTML."""
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return opening + "".join(f"<{tag}>{field}</{tag}>" for field in fields) + "</tr>\n"


def _cell(cell: Sequence[InspectedToken]) -> str:
    """A cell of the running text."""
    kinds = f"t {shown_bits(cell)}{' w' if cell[-1].in_window else ''}"
    shown = escape(visible(cell[0].text)).replace("\n", '<span class="n">\u21b5</span>\n')
    tip = escape("\n".join(map(_tip, cell))).replace("\n", "&#10;")
    return f'<span class="{kinds}" data-tip="{tip}">{shown}</span>'


def _tip(token: InspectedToken) -> str:
    """All of a token in one line."""
    bits = f"{token.chosen}" if not token.in_window else f"{token.bits.bits[0]} bits now, {token.chosen} later"
    parts = [f"#{token.position}", f"{_quoted(token)} (id {token.id})", bits, f"{token.nbytes:,} bytes"]
    if token.features:
        parts += [f"{TITLES[name].split(',')[0]} {value:.3g}" for name, value in token.features._asdict().items()]
    return "  \u00b7  ".join(parts)


def _quoted(token: InspectedToken) -> str:
    if not token.text:
        return "(part of the same character)"
    return "\u201c" + visible(token.text).replace("\n", "\u21b5").replace("\t", "\u21e5") + "\u201d"


def _every_token(inspection: Inspection, featured: bool) -> str:
    """A table of all tokens: for readers who cannot point, and to copy from."""
    names = list(FEATURE_NAMES) if featured else []
    head = ["position", "text", "id", "now", "stored as", "bytes", *(TITLES[name] for name in names)]
    rows = [_row(head, "th")]
    for token in inspection.tokens:
        fields = [str(token.position), escape(_quoted(token)), str(token.id), str(token.bits), str(token.chosen)]
        fields += [str(token.nbytes), *(f"{getattr(token.features, name):.4g}" for name in names)]
        rows.append(_row(fields))
    table = f'<div class="scroll"><table class="all">{"".join(rows)}</table></div>'
    return f"<details><summary>Show {len(inspection.tokens):,} rows</summary>{table}</details>"
