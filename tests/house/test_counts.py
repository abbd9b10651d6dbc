"""docs/security.md has the counts that the tests and the recorded runs have."""

from __future__ import annotations

from tests.tools.counts import HEADING, PAGE, section, tried


def test_the_page_has_the_counts_of_today():
    """After a change of attacks or runs: python -m tests.tools.counts"""
    found = PAGE.read_text(encoding="utf-8").partition(HEADING)[2]
    assert found.strip() == section().strip(), "run python -m tests.tools.counts"


def test_what_is_tried_is_enough():
    counts = tried()
    assert min(counts.values()) > 0
    assert sum(counts.values()) > 500
