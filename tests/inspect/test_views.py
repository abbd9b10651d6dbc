"""What people see of an inspection: whole characters, harmless ones, the same facts in every form."""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser
from io import BytesIO, StringIO
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.controller.policies import TokenFeatures
from kvq.controller.policies.static import StaticPolicy
from kvq.runtime.inspect.inspection import inspect_text
from kvq.runtime.inspect.views import page, palette, panels, plot, terminal
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Pair
from kvq.runtime.text.cells import Cell, cells, columns, graphemes, visible
from tests.tools.checkpoints import small_tokenizer

TEXT = "The captain looked at the sea — naïve 漢字 😀, and then\nhe said: it was late. " * 3
HOSTILE = (
    '<script>alert(1)</script> <img src=x onerror="alert(2)"> \' " & &lt; </span></style> ]]> --> {} \x00\x07\x1b[31m'
    "\x1b]0;title\x07 \x7f \x9b31m \u202eevil\u202c \u2066x\u2069 \u200e \ufeff \u2028 \U000e0041 $\\frac$ \u00ad end"
)
EVERY_PAIR = [Pair(k, v) for k in CODECS for v in CODECS]
SGR = re.compile(r"\x1b\[[0-9;]*m")
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def mixed(tiny_model):
    """An inspection in which every token's precision is known: 16, 8, 4, 2 bits in turn."""
    return inspect_text(tiny_model, TEXT, "mixed", recent=4, sink=0)


@pytest.fixture(scope="module")
def hostile(tiny_model):
    return inspect_text(tiny_model, HOSTILE, "mixed")


# Cells and characters


@pytest.mark.parametrize(
    "character",
    ["é", "e\u0301", "漢", "😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "q\u0323\u0307", "❤\ufe0f", "नि", "ก็"],
)
def test_one_character_is_one_cell(tokenizer, character):
    ids = tokenizer.encode(f"x {character}y").ids
    found = [cell for cell in cells(tokenizer, ids) if set(cell.text) & set(character)]
    assert len(found) == 1
    assert character in found[0].text


def test_two_flags_are_two_cells(tokenizer):
    ids = tokenizer.encode("🇩🇪🇫🇷").ids
    assert [cell.text for cell in cells(tokenizer, ids)] == ["🇩🇪", "🇫🇷"]


@given(text=any_text)
def test_cells_are_all_tokens_and_the_whole_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    found = cells(tokenizer, ids)
    assert "".join(cell.text for cell in found) == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [cell.first for cell in found] == np.cumsum([0, *(cell.length for cell in found[:-1])]).tolist()
    assert found[-1].first + found[-1].length == len(ids)
    assert all(cell.text for cell in found)
    # No character is cut: each cell's own tokens say its text, wherever it stands.
    for cell in found:
        if "\ufffd" not in cell.text:
            own = ids[cell.first : cell.first + cell.length]
            assert tokenizer.decode(own, skip_special_tokens=False) == cell.text


@given(ids=st.lists(st.integers(0, 511), min_size=1, max_size=30))
def test_cells_of_any_ids_are_all_of_them(tokenizer, ids):
    found = cells(tokenizer, ids)
    assert sum(cell.length for cell in found) == len(ids)
    assert [cell.first for cell in found] == np.cumsum([0, *(cell.length for cell in found[:-1])]).tolist()


def test_special_tokens_are_shown_and_a_missing_tokenizer_shows_ids(tokenizer):
    assert cells(tokenizer, [0])[0].text == "<|endoftext|>"
    assert cells(None, [3, 7]) == [Cell(0, 1, "<3>"), Cell(1, 1, "<7>")]


@given(text=st.text())
def test_visible_text_has_no_character_that_acts(text):
    shown = visible(text)
    for character in shown:
        if character not in "\n\t\u200c\u200d":
            assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    assert visible(shown) == shown
    harmless = re.sub(r"[^\W\d_]", "", text).isascii()
    if harmless and text.isprintable():
        assert shown == text


def test_visible_names_what_it_replaces():
    assert visible("a\x1b[0m\u202eb\x7f\x9b\ud800") == "a\u241b[0m<U+202E>b\u2421<U+009B><U+D800>"


@given(text=st.text())
def test_graphemes_are_the_whole_text(text):
    assert "".join(graphemes(text)) == text


# The terminal


def plain(text: str) -> str:
    """Coloured text without its own colours; there must be no other escape."""
    stripped = SGR.sub("", text)
    assert "\x1b" not in stripped
    return stripped


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


@pytest.mark.parametrize(("ramp", "sign"), [(palette.ON_DARK, 1), (palette.ON_LIGHT, -1)])
def test_shades_are_in_order_without_colour_and_text_on_them_is_readable(ramp, sign):
    by_bits = {k + v: palette.shade(Pair(k, v), ramp) for k, v in EVERY_PAIR}
    lightness = [palette._luminance(by_bits[total]) * sign for total in sorted(by_bits)]
    assert (np.diff(lightness) > 0).all()
    for ground in by_bits.values():
        assert palette.contrast(palette.ink(ground), ground) >= 4.5


# The page


class Page(HTMLParser):
    """Elements, attributes and the running text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text, self.styles, self.inside = "", "", 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)
        if self.inside or dict(attrs).get("class") == "text":
            self.inside += tag != "meta"

    def handle_endtag(self, tag):
        if tag in ("path", "rect"):
            return
        assert self.open.pop() == tag
        self.inside = max(0, self.inside - 1)

    def handle_data(self, data):
        if self.inside:
            self.text += data
        if self.open[-1:] == ["style"]:
            self.styles += data


KNOWN_TAGS = set(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "div",
        "span",
        "table",
        "tr",
        "th",
        "td",
        "svg",
        "path",
        "rect",
        "text",
        "details",
        "summary",
    ]
)


@pytest.mark.parametrize("which", ["mixed", "hostile"])
def test_a_page_is_whole_loads_nothing_and_runs_nothing(which, request):
    inspection = request.getfixturevalue(which)
    source = page.html(inspection)
    found = Page(source)
    assert not found.open  # every element closed, in order
    assert {tag for tag, _ in found.found} <= KNOWN_TAGS
    for _, attributes in found.found:
        assert not any(name.startswith("on") or name in ("src", "href", "srcset", "style") for name in attributes)
    assert "default-src 'none'" in source
    assert "url(" not in found.styles
    assert "@import" not in found.styles
    assert found.text == visible("".join(t.text for t in inspection.tokens)).replace("\n", "\u21b5\n")
    for character in source:
        assert character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp")


@settings(deadline=None, max_examples=40)
@given(text=any_text | st.text("<>&\"'/!-[]{};= \n\u202e\x1bas", min_size=1, max_size=30))
def test_the_text_of_a_page_is_the_text(tiny_model, text):
    found = Page(page.html(inspect_text(tiny_model, text, "mixed", features=False)))
    assert not found.open
    assert found.text == visible(text).replace("\n", "\u21b5\n")
    assert {tag for tag, _ in found.found} <= KNOWN_TAGS


def test_every_token_can_be_pointed_at_and_read_in_the_table(mixed):
    source = page.html(mixed)
    found = Page(source)
    tips = [attributes["data-tip"] for _, attributes in found.found if "data-tip" in attributes]
    assert len(tips) == len(mixed.cells())
    lines = "\n".join(tips).split("\n")
    assert len(lines) == len(mixed.tokens)
    for token, line in zip(mixed.tokens, lines, strict=True):
        assert line.startswith(f"#{token.position} ")
        for part in (f"id {token.id})", str(token.chosen), f"{token.nbytes:,} bytes", "entropy", "rarity"):
            assert part in line
        for value in token.features:
            assert f"{value:.3g}" in line
        assert ("16 bits now" in line) == token.in_window
    assert source.count("<tr>") + source.count('<tr class="total">') == len(mixed.tokens) + 1 + len(mixed.totals) + 3


def test_names_that_others_chose_are_escaped(tiny_model):
    name = '<b>"bold"</b>\u202e'
    source = page.html(inspect_text(tiny_model, "Hello", StaticPolicy(name, 4, 4)))
    assert "<b>" not in source
    assert "\u202e" not in source
    assert "&lt;b&gt;&quot;bold&quot;" in source


def test_the_strips_are_drawn_of_the_tokens(mixed):
    drawn = panels.panels(mixed.tokens)
    assert [panel.title.split(",")[0].split()[0] for panel in drawn] == [
        "bits", "entropy", "rarity", "attention", "confidence",
    ]  # fmt: skip
    assert drawn[0].series[0][:4] == [16, 8, 4, 2]
    for panel, name in zip(drawn[1:], TokenFeatures._fields[1:], strict=False):
        values = [getattr(token.features, name) for token in mixed.tokens]
        assert panel.series == [values]
        heights = [panel.height(value) for value in values]
        assert min(heights) >= 0
        assert max(heights) <= 1
        assert np.argmax(heights) == np.argmax(values)
    root = ElementTree.fromstring(panels.svg(mixed.tokens))
    paths = [part.get("d") for part in root if part.get("class") in ("line", "area")]
    assert len(paths) == 6
    assert all("H892.0" in path for path in paths)  # to the right end
    assert paths[1].count("H") == len(mixed.tokens)  # no two neighbours have the same bits


def test_long_texts_are_drawn_as_means():
    assert [panels.run_length(n) for n in (1, 400, 401, 2048)] == [1, 1, 3, 14]
    assert panels.means([1, 3, 5, 7, 20], 2) == [2, 2, 6, 6, 20]
    assert panels.means([1, 3], 1) == [1, 3]
    found = inspect_text(kvq.load(), "The captain looked at the sea. " * 70, "rule")
    root = ElementTree.fromstring(panels.svg(found.tokens))
    kinds = [part.get("class") for part in root if part.tag == "path" and part.get("class") != "axis"]
    assert kinds == ["area", "line"] + ["line single", "line"] * 4
    assert "means over 4 tokens" in page.html(found)


@pytest.mark.parametrize("text", ["a", "Hello", TEXT])
@pytest.mark.parametrize("recent", [0, 16])
def test_pictures_of_short_and_long_texts(tiny_model, text, recent):
    found = inspect_text(tiny_model, text, "int4", recent=recent)
    ElementTree.fromstring(panels.svg(found.tokens))
    assert plot.png(found).startswith(b"\x89PNG\r\n")


def test_a_plot_has_five_panels_and_no_colour(tiny_model, recwarn):
    from matplotlib import image

    found = inspect_text(tiny_model, "$\\frac$ 漢字\n\x1b <&", "mixed")
    pixels = image.imread(BytesIO(plot.png(found)), format="png")
    assert np.ptp(pixels[..., :3], axis=2).max() == 0  # grey: nothing is told by colour
    dark = (pixels[..., 0] < 0.1).mean(1)
    assert ((dark[1:] > 0.7) & (dark[:-1] <= 0.7)).sum() == 5  # the five axes
    assert not recwarn.list
