"""The bar of what is being done, on terminals of all widths."""

from __future__ import annotations

import io

import pytest

from kvq.runtime.cli import progress
from kvq.runtime.cli.progress import Bar, line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [1, 5, 20, 30, 40, 57, 80, 200])
def test_a_line_fits_the_terminal(columns, monkeypatch):
    """One that is as wide as the terminal begins another, which nobody would clear."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "EVERY_S", -1)
    bar = Bar()
    for done in (0, 1000, 2249):
        bar(done, 2249)
    bar.clear()
    drawn = [part for part in terminal.getvalue().split("\r") if part.strip()]
    assert len(drawn) == 3
    assert max(map(len, drawn)) <= max(1, columns - 1)
    assert all(len(line("fetching a model", 5 * 10**6, total, 3.0)) <= max(1, columns - 1) for total in (None, 10**9))
    if columns >= 57:
        assert drawn[-1].rstrip() == f"reading [{'#' * 24}] 2,249 of 2,249 tokens"
