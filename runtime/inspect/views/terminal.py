"""An inspection in a terminal: shaded text with a table of totals, or the same in plain characters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple, TextIO

from kvq.runtime.inspect.records import Inspection, Total
from kvq.runtime.inspect.views.palette import ON_DARK, ink, shade, shown_bits
from kvq.runtime.precision.table import Pair
from kvq.runtime.session.statistics import size
from kvq.runtime.text.cells import columns, graphemes, visible

TAB = "    "
RESET = "\x1b[0m"
WINDOW_MARK = "*"


class Style(NamedTuple):
    """How a run of text is shown: shaded for its bits, underlined in the recent window."""

    bits: Pair
    in_window: bool

    def __str__(self) -> str:
        return f"{self.bits}{WINDOW_MARK if self.in_window else ''}"

    @property
    def sgr(self) -> str:
        """The escape sequence that switches it on, in 24-bit colour."""
        ground = shade(self.bits, ON_DARK)
        parts = ["48", "2", *map(str, ground), "38", "2", *map(str, ink(ground))]
        return f"\x1b[{';'.join([*parts, *(['4'] if self.in_window else [])])}m"


Run = tuple[Style | None, str]


def wants_color(choice: str, stream: TextIO) -> bool:
    """Whether to write colours to a stream.

    Args:
        choice: "always", "never", or "auto": a terminal that is not dumb, unless NO_COLOR is set
            to anything but the empty string (no-color.org).
        stream: where it goes.
    """
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text(inspection: Inspection, color: bool, width: int = 0) -> str:
    """The text by precision, ended by a newline; nothing in it comes from the text as a control sequence.

    In colour each token is shaded, a newline shown as an arrow before it breaks the line. Without,
    runs of one precision stand in brackets, "[k4v2 The captain]", a star for the recent window;
    brackets and backslashes of the text have a backslash before them.

    Args:
        inspection: what to show.
        color: 24-bit colours.
        width: columns to wrap at; 0 does not wrap.
    """
    lines = _wrap(_shaded(inspection) if color else _bracketed(inspection), width)
    return "\n".join("".join(_paint(line)) for line in lines) + "\n"


def _shaded(inspection: Inspection) -> Iterator[Run]:
    for cell in inspection.cells():
        shown = visible(cell[0].text).replace("\t", TAB).replace("\n", "\u21b5\n")
        yield Style(shown_bits(cell), cell[-1].in_window), shown


def _bracketed(inspection: Inspection) -> Iterator[Run]:
    for style, cells in groupby(inspection.cells(), key=lambda cell: Style(shown_bits(cell), cell[-1].in_window)):
        shown = visible("".join(cell[0].text for cell in cells)).replace("\t", TAB)
        for mark in "\\[]":
            shown = shown.replace(mark, "\\" + mark)
        yield None, f"[{style} {shown}]"


def _wrap(runs: Iterator[Run], width: int) -> list[list[Run]]:
    """Lines of at most `width` columns, cut between words where these fit a line; 0: cut at newlines alone."""
    lines: list[list[Run]] = [[]]
    word: list[Run] = []
    at = word_width = 0

    def flush(limit: int) -> None:
        nonlocal at, word, word_width
        if width and at and at + word_width > limit:
            lines.append([])
            at = 0
        lines[-1] += word
        at, word, word_width = at + word_width, [], 0

    for style, part in runs:
        for grapheme in graphemes(part):
            wide = 0 if grapheme == "\n" else columns(grapheme)
            space = grapheme.isspace()
            breaks = space or wide > 1  # scripts of wide characters break anywhere
            if breaks or (width and word_width + wide >= width):
                flush(width - 1)  # where a line is cut, the space between the words ends it
            if grapheme == "\n":
                lines.append([])
                at = 0
                continue
            word.append((style, grapheme))
            word_width += wide
            if breaks:
                flush(width if space else width - 1)
    flush(width)
    return lines


def _paint(line: list[Run]) -> Iterator[str]:
    """The line with its escape sequences, switched off before it ends."""
    for style, parts in groupby(line, key=lambda run: run[0]):
        joined = "".join(part for _, part in parts)
        yield joined if style is None else f"{style.sgr}{joined}{RESET}"


def table(inspection: Inspection, color: bool) -> str:
    """Totals by precision with the shade of each, and what the marks mean; ended by a newline."""
    rows = [("precision", "stored", "in window", "bytes", "bits/value")]
    rows += [_row(total) for total in inspection.totals if total.tokens or total.due]
    stats = inspection.stats
    slack = sum(total.slack_nbytes for total in inspection.totals)
    rows.append(("free room", "", "", f"{slack:,}", ""))
    rows.append(("total", f"{stats.tokens:,}", "", f"{stats.kv_nbytes:,}", f"{stats.kv_bits or 0:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    swatches = {t.precision: f"{Style(t.bits, False).sgr}    {RESET} " for t in inspection.totals if t.bits}
    lines = []
    for row in rows:
        swatch = swatches.get(row[0], " " * 5) if color else ""
        fields = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append((swatch + "  ".join(fields)).rstrip())
    window = "underlined" if color else f"marked {WINDOW_MARK}"
    model = visible(inspection.model)
    about = [f"{stats.tokens} tokens cached in {size(stats.kv_nbytes)} | {stats.policy_text} | model {model}"]
    if stats.recent:
        about.append(f"{window}: the newest {stats.recent}, at {stats.protect_bits} bits until they leave the window")
    if any(len({token.chosen for token in cell}) > 1 for cell in inspection.cells()):
        about.append("a character spread over several tokens is shown at their lowest precision")
    return "\n".join([*lines, *about]) + "\n"


def _row(total: Total) -> tuple[str, str, str, str, str]:
    bits = "-" if total.bits_per_value is None else f"{total.bits_per_value:.2f}"
    due = f"{total.due:,}" if total.bits else ""
    return total.precision, f"{total.tokens:,}", due, f"{total.nbytes:,}", bits
