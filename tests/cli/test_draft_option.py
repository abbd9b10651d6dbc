"""`--draft` as users give it."""

from __future__ import annotations

import pytest

from tests.tools.command_line import assert_one_line_error, run

TEXT = "Nobody spoke. The boats lay still. " * 3


@pytest.mark.slow
def test_the_text_is_the_same_and_the_statistics_say_what_was_drafted():
    told = {draft: run("kvq-books", "--raw", "--draft", draft, TEXT) for draft in ("auto", "off", "3")}
    assert {done.returncode for done in told.values()} == {0}
    assert len({done.stdout for done in told.values()}) == 1
    assert "drafted tokens accepted" not in told["off"].stderr
    assert "drafted tokens accepted" in told["3"].stderr


@pytest.mark.slow
def test_a_wrong_draft_is_one_line_that_names_its_variable():
    done = run("kvq-books", "--draft", "many", "x")
    assert_one_line_error(done, 'draft must be "auto", "off" or a number of tokens', code=2)
    done = run("kvq-books", "x", env={"KVQ_DRAFT": "40"})
    assert_one_line_error(done, "at most the 16 tokens of the recent window", "KVQ_DRAFT=40", code=2)
