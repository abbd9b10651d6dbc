"""Precision and features along a text as panels, and these as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvq.runtime.inspect.records import InspectedToken

LONG = 400  # tokens of a text from which on single ones are too narrow to see
RUNS = 150  # means along a longer text


class Panel(NamedTuple):
    """One quantity along the text.

    title: what it is, with its unit.
    series: one value a token each; the first is drawn as a line, a second one as an area behind it.
    low, high: ends of its axis.
    ticks: values to label.
    logarithmic: the kind of its axis.
    """

    title: str
    series: list[list[float]]
    low: float
    high: float
    ticks: list[float]
    logarithmic: bool = False

    def height(self, value: float) -> float:
        """Where on the axis a value stands, 0 to 1; what is off the axis is at its end."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def run_length(count: int) -> int:
    """Tokens over which the lines of a text are averaged: 1 as long as single tokens can be seen in a picture."""
    return 1 if count <= LONG else -(-count // RUNS)


def means(values: Sequence[float], run: int) -> list[float]:
    """Each value replaced by the mean of its run of `run` values."""
    found: list[float] = []
    for start in range(0, len(values), run):
        part = values[start : start + run]
        found += [sum(part) / len(part)] * len(part)
    return found


def about(count: int) -> str:
    """What to say about a text of `count` tokens whose lines are averaged; nothing of a shorter one."""
    run = run_length(count)
    return "" if run == 1 else f"Strong lines and the area are means over {run} tokens, faint ones single tokens."


def panels(tokens: Sequence[InspectedToken]) -> list[Panel]:
    """Bits, and where the tokens have them entropy, rarity, attention variance and confidence."""
    bits = [[float(token.chosen.bits[side]) for token in tokens] for side in (0, 1)]
    found = [Panel("bits stored as: keys line, values area", bits, 1.8, 18, [2, 4, 8, 16], True)]
    features = [token.features for token in tokens if token.features]
    if not features:
        return found
    entropy, rarity, variance, confidence = (list(column) for column in zip(*features, strict=True))
    found.append(_from_zero("entropy, nats", entropy))
    found.append(_from_zero("rarity, nats", rarity))
    # A row's variance falls with the square of its length; that of the first row, of one weight, is zero.
    decades = [math.log10(value) for value in variance if value > 0] or [0.0]
    low, high = math.floor(min(decades)), math.ceil(max(decades) + 1e-9)
    ticks = [10.0**decade for decade in range(low, high + 1)]
    found.append(Panel("attention variance", [variance], ticks[0], ticks[-1], ticks[:: max(1, len(ticks) // 3)], True))
    found.append(Panel("confidence", [confidence], 0, 1, [0, 0.5, 1]))
    return found


def _from_zero(title: str, values: list[float]) -> Panel:
    high = max(*values, 1e-6)
    unit = next(u for u in (10.0**e * m for e in range(-7, 9) for m in (1, 2, 5)) if high / u <= 4)
    high = unit * math.ceil(high / unit)
    return Panel(title, [values], 0, high, [unit * i for i in range(round(high / unit) + 1)])


WIDTH, LEFT, RIGHT, TOP, PANEL, GAP = 900, 46, 8, 22, 62, 30  # of the picture, in its own units


def svg(tokens: Sequence[InspectedToken]) -> str:
    """The panels above one axis of positions; classes: axis, title, line, single, area, window."""
    drawn, window = panels(tokens), sum(token.in_window for token in tokens)
    run = run_length(len(tokens))
    height = TOP + len(drawn) * (PANEL + GAP)
    scale = (WIDTH - LEFT - RIGHT) / len(tokens)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Bits and features along the text">']
    for i, panel in enumerate(drawn):
        bottom = TOP + i * (PANEL + GAP) + PANEL
        if window:
            x = LEFT + scale * (len(tokens) - window)
            place = f'x="{x:.1f}" y="{bottom - PANEL}" width="{scale * window:.1f}" height="{PANEL}"'
            parts.append(f'<rect class="window" {place}/>')
        for tick in panel.ticks:
            y = bottom - PANEL * panel.height(tick)
            parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text class="title" x="{LEFT}" y="{bottom - PANEL - 7}">{panel.title}</text>')
        if run > 1 and len(panel.series) == 1:
            parts.append(_path("line single", [panel.height(value) for value in panel.series[0]], bottom, scale))
        for series, kind in zip(panel.series[::-1], ("area", "line")[-len(panel.series) :], strict=True):
            parts.append(_path(kind, [panel.height(value) for value in means(series, run)], bottom, scale))
    for position in _round_positions(len(tokens)):
        x = LEFT + scale * (position + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{position}</text>')
    return "\n".join([*parts, "</svg>"])


def _path(kind: str, heights: list[float], bottom: float, scale: float) -> str:
    """A line of steps, one a token, or the area below it."""
    steps: list[str] = []
    for at, height in enumerate(heights):
        if at and height == heights[at - 1]:
            steps.pop()  # a longer step instead of two
        steps.append(f"V{bottom - PANEL * height:.1f}H{LEFT + scale * (at + 1):.1f}")
    start, end = (
        (f"M{LEFT} {bottom}", f"V{bottom}") if kind == "area" else (f"M{LEFT} {steps[0][1:].split('H')[0]}", "")
    )
    return f'<path class="{kind}" d="{start}{"".join(steps)}{end}"/>'


def _round_positions(count: int) -> range:
    """At most eleven positions to label."""
    unit = next(10**e * m for e in range(12) for m in (1, 2, 5) if count / (10**e * m) <= 10)
    return range(0, count, unit)
