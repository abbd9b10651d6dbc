"""An inspection as a report and as pictures: whole, escaped, loading and running nothing, the same facts."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.controller.policies import TokenFeatures
from kvq.controller.policies.static import StaticPolicy
from kvq.runtime.inspect.inspection import inspect_text
from kvq.runtime.inspect.views import palette, panels, plot, report
from kvq.runtime.text.cells import visible
from tests.tools.inspected import EVERY_PAIR, TEXT, any_text


@pytest.mark.parametrize(("ramp", "sign"), [(palette.ON_DARK, 1), (palette.ON_LIGHT, -1)])
def test_shades_are_in_order_without_colour_and_text_on_them_is_readable(ramp, sign):
    by_bits = {sum(pair.bits): palette.shade(pair, ramp) for pair in EVERY_PAIR}
    lightness = [palette._luminance(by_bits[total]) * sign for total in sorted(by_bits)]
    assert (np.diff(lightness) > 0).all()
    for ground in by_bits.values():
        assert palette.contrast(palette.ink(ground), ground) >= 4.5


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
    source = report.html(inspection)
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
    found = Page(report.html(inspect_text(tiny_model, text, "mixed", features=False)))
    assert not found.open
    assert found.text == visible(text).replace("\n", "\u21b5\n")
    assert {tag for tag, _ in found.found} <= KNOWN_TAGS


def test_every_token_can_be_pointed_at_and_read_in_the_table(mixed):
    source = report.html(mixed)
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
        assert (f"{token.bits.bits[0]} bits now" in line) == token.in_window
    assert source.count("<tr>") + source.count('<tr class="total">') == len(mixed.tokens) + 1 + len(mixed.totals) + 3


def test_names_that_others_chose_are_escaped(tiny_model):
    name = '<b>"bold"</b>\u202e'
    source = report.html(inspect_text(tiny_model, "Hello", StaticPolicy(name, 4, 4)))
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
    assert "means over 4 tokens" in report.html(found)


@pytest.mark.parametrize("text", ["a", "Hello", TEXT])
@pytest.mark.parametrize("recent", [0, 16])
def test_pictures_of_short_and_long_texts(tiny_model, text, recent):
    found = inspect_text(tiny_model, text, "int4", recent=recent)
    ElementTree.fromstring(panels.svg(found.tokens))
    assert plot.png(found).startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_a_plot_has_five_panels_and_no_colour(tiny_model, recwarn):
    from matplotlib import image

    found = inspect_text(tiny_model, "$\\frac$ 漢字\n\x1b <&", "mixed")
    pixels = image.imread(BytesIO(plot.png(found)), format="png")
    assert np.ptp(pixels[..., :3], axis=2).max() == 0  # grey: nothing is told by colour
    dark = (pixels[..., 0] < 0.1).mean(1)
    assert ((dark[1:] > 0.7) & (dark[:-1] <= 0.7)).sum() == 5  # the five axes
    assert not recwarn.list
