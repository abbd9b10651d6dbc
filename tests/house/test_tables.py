"""Tables of the documents: every row has as many cells as its header, and a line of dashes stands below that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house.test_links import PAGES, ROOT, prose

CELL_END = re.compile(r"(?<!\\)\|")  # a bar that is no cell's end has a backslash, in code too
DASHES = re.compile(r":?-+:?")


def cells(row: str) -> list[str]:
    """What stands between the bars of a row."""
    return [cell.strip() for cell in CELL_END.split(row.strip().removeprefix("|").removesuffix("|"))]


def broken_rows(text: str) -> list[str]:
    """Rows that have another number of cells than their table's header, and tables without a line of dashes."""
    wrong: list[str] = []
    table: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            table.append(line)
            continue
        if table:
            width = len(cells(table[0]))
            wrong += [row for row in table if len(cells(row)) != width or not row.rstrip().endswith("|")]
            if len(table) < 2 or not all(DASHES.fullmatch(cell) for cell in cells(table[1])):
                wrong.append(f"no dashes below {table[0]}")
        table = []
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(Path(page).relative_to(ROOT)))
def test_rows_have_the_cells_of_their_header(page):
    assert not broken_rows(prose(page))


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ("| a | b |\n|---|---|\n| 1 | 2 |", 0),
        ("| a | b |\n|---|---|\n| 1 |", 1),
        ("| a | b |\n|---|---|\n| 1 | 2 | 3 |\n| `x \\| y` | 2 |", 1),
        ("| a | b |\n|---|---|\n| 1 | 2", 1),
        ("| a | b |\n| 1 | 2 |", 1),
        ("| a | b |\n|---|--:|\n| | |", 0),
    ],
)
def test_what_counts_as_broken(table, wrong):
    assert len(broken_rows(table)) == wrong
