"""An inspection in a terminal: shades and marks, nothing that acts, lines that fit."""

from __future__ import annotations

import re
import unicodedata
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.runtime.inspect.inspection import inspect_text
from kvq.runtime.inspect.views import palette, terminal
from kvq.runtime.text.cells import columns, graphemes, visible
from tests.tools.inspected import any_text, plain


def unwrapped(inspection) -> str:
    return visible("".join(token.text for token in inspection.tokens)).replace("\t", "    ")


def test_each_token_has_the_shade_of_its_precision(mixed):
    shown = terminal.text(mixed, color=True)
    assert plain(shown) == unwrapped(mixed).replace("\n", "\u21b5\n") + "\n"
    found = []
    for code, run in re.findall(r"\x1b\[([0-9;]+)m([^\x1b]+)\x1b\[0m", shown):
        ground = tuple(map(int, code.split(";")[2:5]))
        found += [(character, ground, code.endswith(";4")) for character in run if not character.isspace()]
    expected = []
    for cell in mixed.cells():
        lowest = min(token.chosen for token in cell)
        ground = palette.shade(lowest, palette.ON_DARK)
        text = cell[0].text.replace("\n", "\u21b5\n")
        expected += [(c, ground, cell[-1].in_window) for c in text if not c.isspace()]
    assert found == expected
    assert len({ground for _, ground, _ in found}) == 4


def test_without_colour_runs_are_marked_with_their_precision(mixed):
    shown = terminal.text(mixed, color=False)
    assert "\x1b" not in shown
    runs = re.findall(r"\[(k\d+v\d+)(\*?) ((?:[^\\\[\]]|\\.)*)\]", shown)
    assert "".join(re.sub(r"\\(.)", r"\1", text) for _, _, text in runs) == unwrapped(mixed)
    expected = []
    for cell in mixed.cells():
        mark = (str(min(token.chosen for token in cell)), "*" if cell[-1].in_window else "")
        if mark not in expected[-1:]:
            expected.append(mark)
    assert [run[:2] for run in runs] == expected


@pytest.mark.parametrize("color", [True, False])
def test_nothing_in_a_text_acts_on_the_terminal(hostile, color):
    shown = plain(terminal.text(hostile, color)) + plain(terminal.table(hostile, color))
    for character in shown:
        assert character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp")
    unmarked = re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)\]|(?<!\\)\[k\d+v\d+\*? ", "", shown))
    for piece in ("<script>alert(1)</script>", "\u241b[31m", "<U+202E>evil<U+202C>"):
        assert piece in (shown if color else unmarked)


@settings(deadline=None, max_examples=40)
@given(text=any_text, width=st.integers(12, 40), color=st.booleans())
def test_lines_fit_the_terminal_and_lose_nothing(tiny_model, text, width, color):
    found = inspect_text(tiny_model, text, "mixed", features=False)
    whole, wrapped = (plain(terminal.text(found, color, columns)) for columns in (0, width))
    assert wrapped.replace("\n", "") == whole.replace("\n", "")
    for line in wrapped.split("\n"):
        clusters = list(graphemes(line))
        assert sum(map(columns, clusters)) <= max(width, max(map(columns, clusters), default=0))


def test_lines_are_cut_between_words(tiny_model):
    text = "The captain looked at the sea and said that it was late"
    found = inspect_text(tiny_model, text, "fp16", features=False)
    lines = plain(terminal.text(found, True, 20)).splitlines()
    assert [line.rstrip() for line in lines] == ["The captain looked", "at the sea and said", "that it was late"]


def test_the_table_has_all_totals(mixed):
    shown = terminal.table(mixed, color=False)
    for total in mixed.totals:
        row = next(line for line in shown.splitlines() if line.startswith(total.precision + " "))
        assert f"{total.nbytes:,}" in row.split()
        assert str(total.tokens) in row.split()
    assert f"{mixed.stats.kv_nbytes:,}" in shown
    assert plain(terminal.table(mixed, color=True)) != terminal.table(mixed, color=True)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("choice", "stream", "env", "expected"),
    [
        ("auto", Terminal(), {}, True),
        ("auto", StringIO(), {}, False),
        ("auto", Terminal(), {"NO_COLOR": "1"}, False),
        ("auto", Terminal(), {"NO_COLOR": ""}, True),
        ("auto", Terminal(), {"TERM": "dumb"}, False),
        ("always", StringIO(), {"NO_COLOR": "1", "TERM": "dumb"}, True),
        ("never", Terminal(), {}, False),
    ],
)
def test_when_colours_are_used(monkeypatch, choice, stream, env, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert terminal.wants_color(choice, stream) is expected
