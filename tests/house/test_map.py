"""docs/tests.md lists every test file with the promise it guards, and no file that is not there."""

from __future__ import annotations

import re

import pytest

from tests.tools.map import HEADING, PAGE, listing, promise
from tests.tools.tree import named, sources


def test_every_test_file_says_what_it_guards():
    silent = [named(path) for path in sources("tests") if path.name.startswith("test_") and not promise(path)]
    assert not silent


@pytest.mark.slow
def test_the_map_lists_every_test_file_and_no_other():
    """After a change of test files or of what they say: python -m tests.tools.map"""
    found = PAGE.read_text(encoding="utf-8").partition(HEADING)[2]
    listed = re.findall(r"^\* `(\S+)`: ", found, re.M)
    there = [named(path) for path in sources("tests") if path.name.startswith("test_")]
    assert sorted(set(there) ^ set(listed)) == [], "listed or there, but not both: run python -m tests.tools.map"
    assert found.strip() == listing().strip(), "run python -m tests.tools.map"
