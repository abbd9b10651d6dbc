"""Writers killed before every step: the old is there or the new, whole, and the next write goes through."""

from __future__ import annotations

import os

import pytest

from tests.tools.kills import WRITERS, found_of, recorded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are killed in a child that is forked")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new(name):
    found = found_of(name)
    assert found["kills"] == found["old"] + found["new"] > 5
    assert found["old"] > 0
    assert found["what"] in [row.what for row in recorded()]  # python -m tests.tools.kills


def test_all_of_them_are_recorded():
    assert len(recorded()) == len(WRITERS)
    assert all(row.kills == row.old + row.new > 5 for row in recorded())
