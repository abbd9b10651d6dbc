"""Inspection: records are what the store holds, nothing is changed by looking, nothing in a text does harm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.controller.policies import POLICIES, TokenFeatures
from kvq.controller.policies.static import StaticPolicy
from kvq.runtime.cells import Cell, cells, columns, graphemes, visible
from kvq.runtime.codecs import CODECS
from kvq.runtime.errors import ContextError, PolicyError, PromptError
from kvq.runtime.inspection import inspect_session, inspect_text, stored_tokens
from kvq.runtime.pages import Bits
from kvq.runtime.views import page, palette, panels, plot, terminal
from tests.checkpoints import small_tokenizer
from tests.test_cli import HEAVY, LOADED, assert_one_line_error, python
from tests.test_cli import kvq as command_line

TEXT = "The captain looked at the sea — naïve 漢字 😀, and then\nhe said: it was late. " * 3
HOSTILE = (
    '<script>alert(1)</script> <img src=x onerror="alert(2)"> \' " & &lt; </span></style> ]]> --> {} \x00\x07\x1b[31m'
    "\x1b]0;title\x07 \x7f \x9b31m \u202eevil\u202c \u2066x\u2069 \u200e \ufeff \u2028 \U000e0041 $\\frac$ \u00ad end"
)
EVERY_PAIR = [Bits(k, v) for k in CODECS for v in CODECS]
SGR = re.compile(r"\x1b\[[0-9;]*m")
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def mixed(tiny_model):
    """An inspection in which every token's precision is known: 16, 8, 4, 2 bits in turn."""
    return inspect_text(tiny_model, TEXT, "mixed", recent=4)


@pytest.fixture(scope="module")
def hostile(tiny_model):
    return inspect_text(tiny_model, HOSTILE, "mixed")


# What is stored


def expected_bits(policy: str, position: int) -> tuple[int, int]:
    """By the policy's description, written down here once more."""
    if policy == "mixed":
        return ((16, 16), (8, 8), (4, 4), (2, 2))[position % 4]
    return {"fp16": (16, 16), "int4": (4, 4), "k8v2": (8, 2)}[policy]


@pytest.mark.parametrize("policy", ["fp16", "int4", "k8v2", "mixed"])
@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (4, 0), (4, 9), (300, 0)])
def test_records_are_what_the_store_was_given(tiny_model, policy, recent, sink):
    found = inspect_text(tiny_model, TEXT, policy, recent=recent, sink=sink)
    ids = tiny_model.encode(TEXT)
    assert [token.id for token in found.tokens] == ids
    for i, token in enumerate(found.tokens):
        chosen = (16, 16) if i < sink else expected_bits(policy, i)
        assert (token.position, token.chosen) == (i, chosen)
        assert token.in_window == (i >= len(ids) - recent)
        assert token.bits == ((16, 16) if token.in_window else chosen)


@pytest.mark.parametrize("options", [{}, {"recent": 0}, {"sink": 7}, {"recent": 300}], ids=str)
@pytest.mark.parametrize("policy", ["fp16", "int2", "mixed", "random", "rule"])
def test_totals_add_up_to_the_arrays_of_the_store(tiny_model, policy, options):
    found = inspect_text(tiny_model, TEXT, policy, **options)
    session = tiny_model.session(policy, **options)
    session.append(tiny_model.encode(TEXT))
    stats = session.stats()
    assert found.stats.precisions == stats.precisions
    used = sum(token.nbytes for token in found.tokens)
    assert used == session.store.used_nbytes == sum(total.nbytes for total in found.totals)
    assert used + sum(total.slack_nbytes for total in found.totals) == stats.kv_nbytes
    for total in found.totals:
        mine = [t for t in found.tokens if (t.in_window if total.bits is None else not t.in_window)]
        mine = [t for t in mine if total.bits in (None, t.bits)]
        assert (total.tokens, total.nbytes) == (len(mine), sum(t.nbytes for t in mine))
        if total.bits:
            assert total.due == sum(t.in_window and t.chosen == total.bits for t in found.tokens)
        if mine:
            assert total.bits_per_value == pytest.approx(8 * total.nbytes / (len(mine) * 2 * 3 * 4 * 8))
    assert sum(total.tokens for total in found.totals) == stats.tokens


def stored_bytes(session) -> list[bytes]:
    """Every array of the store."""
    window = session.store.window
    arrays = [window.bits, window.keys.codes, window.keys.scales, window.values.codes, window.values.scales]
    for _, bucket in sorted(session.store.buckets.items()):
        for one in bucket.pages:
            arrays += [one.positions, one.keys.codes, one.keys.scales, one.values.codes, one.values.scales]
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fp16", {}), ("mixed", {"prefill_chunk": 16}), ("rule", {}), ("adaptive", {}), ("paper", {"sink": 4}),
        ("adaptive", {"kv_bits": 3.25}), ("rule", {"kv_memory": 2_500_000}), ("random", {"kv_bits": 5}),
    ],
    ids=str,
)  # fmt: skip
def test_looking_at_features_changes_no_stored_byte(policy, options):
    model = kvq.load()
    ids = model.encode(TEXT * 2)
    plain = model.session(policy, **options)
    plain.append(ids)
    looked_at = model.session(policy, **options)
    before = looked_at.policy
    features = kvq.runtime.inspection._run(looked_at, ids)
    assert looked_at.policy is before
    assert len(features) == len(ids)
    assert stored_bytes(looked_at) == stored_bytes(plain)


def test_a_policy_sees_the_features_it_asked_for_and_no_others(tiny_model):
    seen = []

    class Nosy(StaticPolicy):
        needs = frozenset({"rarity"})

        def choose(self, features):
            seen.append(features)
            return super().choose(features)

    inspect_text(tiny_model, "Hello", Nosy("nosy", 4, 4))
    assert all(chunk.rarity is not None and chunk.entropy is None for chunk in seen)


def test_features_are_those_of_their_formulas(tiny_model):
    ids = tiny_model.encode(TEXT)
    found = inspect_text(tiny_model, TEXT, "fp16", prefill_chunk=16)
    logits = tiny_model.session(prefill_chunk=16).append(ids, all_logits=True).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = [token.features for token in found.tokens]
    np.testing.assert_allclose([row.entropy for row in rows], -(p * np.log(p)).sum(1), rtol=1e-3)
    np.testing.assert_allclose([row.confidence for row in rows], p.max(1), rtol=1e-3)
    rarity = [-np.log((ids[:i].count(x) + 1) / (i + len(set(ids[:i])) + 1)) for i, x in enumerate(ids)]
    np.testing.assert_allclose([row.rarity for row in rows], rarity, rtol=1e-5, atol=1e-6)
    assert rows[0].attention_variance == pytest.approx(0, abs=1e-6)  # a row of one weight
    assert all(0 < row.attention_variance < 0.25 for row in rows[1:])


@pytest.mark.parametrize(
    ("policy", "options"), [("rule", {}), ("mixed", {"recent": 0, "sink": 3}), (None, {"kv_bits": 3.5})]
)
def test_a_session_is_inspected_as_its_text_is(policy, options):
    model = kvq.load()
    session = model.session(policy, **options)
    session.append(model.encode(TEXT))
    before, tokens = stored_bytes(session), list(session.tokens)
    found = inspect_session(session)
    expected = inspect_text(model, TEXT, policy, **options)
    assert found.tokens == expected.tokens
    assert found.totals == expected.totals
    assert (stored_bytes(session), session.tokens) == (before, tokens)
    assert inspect_session(session, features=False).tokens[0].features is None


def test_a_session_that_generated_and_was_trimmed_can_be_inspected(tiny_model):
    session = tiny_model.session("mixed", recent=4)
    list(session.generate("Hello there", max_tokens=20, temperature=0, ignore_eos=True))
    session.trim(15)
    found = inspect_session(session)
    assert [token.id for token in found.tokens] == session.tokens
    assert [token.chosen for token in found.tokens] == [expected_bits("mixed", i) for i in range(15)]
    assert all(np.isfinite(token.features).all() for token in found.tokens)


def test_what_cannot_be_inspected_is_refused_by_name(tiny_model):
    for empty in ("", []):
        with pytest.raises(PromptError, match="the text is empty"):
            inspect_text(tiny_model, empty)
    with pytest.raises(PromptError, match="the session is empty"):
        inspect_session(tiny_model.session())
    with pytest.raises(ContextError, match="do not fit into the context of 256"):
        inspect_text(tiny_model, [1] * 257)
    with pytest.raises(PromptError, match="token ids must be integers"):
        inspect_text(tiny_model, [512])
    with pytest.raises(PolicyError, match="unknown policy"):
        inspect_text(tiny_model, "Hello", "int5")


def test_an_inspection_is_plain_values_for_json(mixed):
    again = json.loads(json.dumps(mixed.as_dict()))
    assert again["tokens"][0].keys() >= {"position", "id", "text", "key_bits", "value_bits", "nbytes", "entropy"}
    assert [row["chosen_key_bits"] for row in again["tokens"][:4]] == [16, 8, 4, 2]
    assert {row["precision"] for row in again["totals"]} == {"k16v16", "k8v8", "k4v4", "k2v2", "recent"}
    assert again["stats"]["kv_nbytes"] == sum(row["nbytes"] + row["slack_nbytes"] for row in again["totals"])


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
    by_bits = {k + v: palette.shade(Bits(k, v), ramp) for k, v in EVERY_PAIR}
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


# The command


def inspect(model, *arguments, **options) -> subprocess.CompletedProcess:
    return command_line("inspect", "--model", str(model), *arguments, **options)


def test_text_goes_to_stdout_and_totals_to_stderr(tiny_bundle, tiny_model):
    done = inspect(tiny_bundle, "-p", "mixed", "--recent", "2", TEXT.strip())
    assert done.returncode == 0
    expected = inspect_text(tiny_model, TEXT.strip(), "mixed", recent=2, features=False)
    assert done.stdout == terminal.text(expected, color=False)
    assert done.stderr == terminal.table(expected, color=False)
    quiet = inspect(tiny_bundle, "-q", "-p", "mixed", "--recent", "2", input=TEXT.strip())
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_colours_on_demand_and_a_file_or_stdin(tiny_bundle, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(HOSTILE)
    for arguments, stdin in ((["-f", str(file)], ""), (["-f", "-"], HOSTILE), ([], HOSTILE)):
        done = inspect(tiny_bundle, "-p", "int4", "--color", "always", *arguments, input=stdin, env={"NO_COLOR": "1"})
        assert done.returncode == 0
        assert "\x1b[48;2;" in done.stdout
        assert "\x1b[48;2;" in done.stderr
        assert plain(done.stdout) == visible(HOSTILE) + "\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize(
    ("env", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_a_terminal_gets_colours_unless_told_otherwise(tiny_bundle, env, colored):
    ours, theirs = os.openpty()
    arguments = [sys.executable, "-m", "kvq", "inspect", "-m", str(tiny_bundle), "-p", "mixed", "-q", "Hello there"]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "40"} | env
    with subprocess.Popen(arguments, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert process.wait(120) == 0, process.stderr.read()
    assert (b"\x1b[48;2;" in shown) is colored
    assert (b"[k8v8* " in shown) is not colored


def test_json_is_one_object_in_ascii(tiny_bundle):
    done = inspect(tiny_bundle, "--json", "-q", "-p", "mixed", HOSTILE.replace("\x00", ""))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert "".join(token["text"] for token in result["tokens"]) == result["text"] == HOSTILE.replace("\x00", "")
    assert sum(row["nbytes"] + row["slack_nbytes"] for row in result["totals"]) == result["stats"]["kv_nbytes"]
    assert {"entropy", "rarity", "attention_variance", "confidence"} <= result["tokens"][0].keys()


def test_page_and_plot_are_written_instead_of_the_text(tiny_bundle, tmp_path):
    made = tmp_path / "page.html", tmp_path / "plot.png"
    made[0].write_text("old")
    done = inspect(tiny_bundle, "-p", "rule", "--html", str(made[0]), "--png", str(made[1]), input=TEXT)
    assert (done.returncode, done.stdout) == (0, "")
    assert "bits/value" in done.stderr
    assert made[0].read_text().startswith("<!doctype html>")
    assert made[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == sorted(made)


def test_a_page_that_cannot_be_written_is_one_line(tiny_bundle, tmp_path):
    missing = tmp_path / "no" / "page.html"
    done = inspect(tiny_bundle, "-p", "int4", "--html", str(missing), "Hello")
    assert_one_line_error(done, "page.html", "No such file")
    assert_one_line_error(inspect(tiny_bundle, "-p", "int4", "--html", str(tmp_path), "Hello"), "Is a directory")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A saved session and what was in it."""
    session = tiny_model.session("mixed", recent=4, sink=2)
    list(session.generate(TEXT, max_tokens=9, temperature=0, ignore_eos=True))
    file = tmp_path_factory.mktemp("sessions") / "saved.kvq"
    session.save(file)
    return file, session


def test_a_saved_session_is_what_it_was(saved, tiny_model):
    file, session = saved
    found, expected = inspect_session(tiny_model.load_session(file)), inspect_session(session)
    assert found.tokens == expected.tokens
    assert found.totals == expected.totals


def test_the_command_shows_a_saved_session(saved, tiny_bundle):
    file, session = saved
    expected = inspect_session(session)
    done = inspect(tiny_bundle, "--session", str(file))
    assert (done.returncode, done.stdout) == (0, terminal.text(expected, color=False))
    assert done.stderr == terminal.table(expected, color=False)
    result = json.loads(inspect(tiny_bundle, "--session", str(file), "--json", "-q").stdout)
    assert result["tokens"] == json.loads(json.dumps([token.as_dict() for token in expected.tokens]))


@pytest.mark.parametrize(
    "option",
    [
        ["Hello"],
        ["-f", "x"],
        ["-p", "int4"],
        ["--kv-bits", "4"],
        ["--kv-memory", "1MB"],
        ["--recent", "16"],
        ["--sink", "0"],
    ],
    ids=" ".join,
)
def test_what_a_session_has_of_its_own_is_refused_beside_it(saved, tiny_bundle, option):
    done = inspect(tiny_bundle, "--session", str(saved[0]), *option)
    assert (done.returncode, done.stdout) == (2, "")
    assert "exclude each other" in done.stderr


def test_a_session_file_that_is_none_is_one_line(tiny_bundle, tmp_path):
    (tmp_path / "text.kvq").write_text("Hello")
    assert_one_line_error(inspect(tiny_bundle, "--session", str(tmp_path / "text.kvq")), "is not a session file")
    assert_one_line_error(inspect(tiny_bundle, "--session", str(tmp_path / "no.kvq")), "no session file")


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (["-p", "int4", ""], "", 1, ["the prompt is empty"]),
        (["-p", "int4"], " \n", 1, ["the prompt is empty"]),
        (["-p", "int4"], "word " * 3000, 1, ["do not fit", "context of 256"]),
        (["-p", "int4"], b"caf\xe9", 1, ["stdin is not UTF-8"]),
        (["-p", "int4", "-f", "missing.txt"], "", 1, ["cannot read missing.txt"]),
        (["-p", "int5", "Hello"], "", 2, ["unknown policy 'int5'"]),
        (["Hello"], "", 2, ["no 'adaptive' controller", "train-controller"]),
        (["-p", "int4", "--kv-bits", "4", "Hello"], "", 2, ["cannot follow a budget"]),
        (["-p", "rule", "--kv-memory", "much", "Hello"], "", 2, ["'much' is not a size"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_known_error_is_one_line(tiny_bundle, tmp_path, monkeypatch, arguments, stdin, code, words):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(inspect(tiny_bundle, *arguments, input=stdin), *words, code=code)


def test_a_missing_matplotlib_is_named_before_the_model_runs(tiny_bundle, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    png = tmp_path / "plot.png"
    done = inspect(tiny_bundle, "-p", "int4", "--png", str(png), "Hello", env={"PYTHONPATH": path})
    assert_one_line_error(done, "matplotlib", "kvq[plot]")
    assert not png.exists()


def test_help_shows_examples_and_loads_no_model_code():
    out = python(
        f"import sys; sys.argv = ['kvq', 'inspect', '-h']\nfrom kvq.runtime.cli.main import main\nmain()\n{LOADED}"
    )
    assert "Examples:" in out
    assert "[default: auto]" in out
    assert not {*HEAVY, "onnxruntime", "matplotlib"} & set(out.splitlines()[-1].split())


def test_a_terminal_without_unicode_does_not_crash(tiny_bundle):
    done = inspect(tiny_bundle, "-p", "int4", "--color", "always", TEXT, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\x1b[48;2;" in done.stdout


def test_stored_tokens_of_an_empty_store_are_none(tiny_model):
    assert all(len(part) == 0 for part in stored_tokens(tiny_model.session().store))


def test_the_documentation_names_the_files_it_shows_and_its_program_runs(capsys):
    folder = Path(__file__).resolve().parents[1] / "docs"
    source = (folder / "inspect.md").read_text()
    for image in re.findall(r"!\[.*?\]\((.*?)\)", source):
        assert (folder / image).stat().st_size < 150_000
    assert all(policy in POLICIES for policy in re.findall(r"-p (\w+)", source))
    (program,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out.count("\n") == len(kvq.load().encode("The captain looked at the sea"))
