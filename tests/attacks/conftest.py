"""A good session file, to be made a bad one."""

from __future__ import annotations

import pytest

from tests.tools.bad_sessions import saved


@pytest.fixture(scope="session")
def good(tiny_model, tmp_path_factory):
    """Path of a session file with every precision, a window and logits."""
    path = tmp_path_factory.mktemp("attacked") / "good.kvq"
    saved(tiny_model, path)
    return path
