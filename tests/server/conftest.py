"""One server for all tests that do not need their own, its client, and the model it serves."""

from __future__ import annotations

import pytest

from tests.tools.serving import served


@pytest.fixture(scope="session")
def model(embedded):
    """The model that `kvq serve` serves, to ask it without a server."""
    return embedded


@pytest.fixture(scope="package")
def server():
    """`kvq serve` with four at work and eight waiting."""
    with served("--max-tokens", "1500", "--concurrency", "4", "--queue", "8") as server:
        yield server


@pytest.fixture(scope="package")
def client(server):
    """The official openai client of `server`."""
    return server.client()
