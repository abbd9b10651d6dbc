"""Cells: whole characters, harmless ones, and all tokens of a text."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.text.cells import Cell, cells, graphemes, visible
from tests.tools.checkpoints import small_tokenizer
from tests.tools.inspected import any_text


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


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
