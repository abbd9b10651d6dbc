"""A session file that tests take apart."""

from __future__ import annotations

import pytest

from tests.tools.bad_sessions import saved


@pytest.fixture(scope="session")
def good(tiny_model, tmp_path_factory):
    """Path of a good file: every precision, a window, logits."""
    path = tmp_path_factory.mktemp("good") / "good.kvq"
    saved(tiny_model, path)
    return path
