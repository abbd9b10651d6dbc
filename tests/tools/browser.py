"""Chromium without a window, for tests of pages. The system's own: no other browser is fetched."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.tools.packages import needs

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Its path. Without it the test is skipped; where a landing is decided (KVQ_CI=1) that is an error."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        assert os.environ.get("KVQ_CI") != "1", "chromium is not installed; .ci/run installs it"
        pytest.skip("chromium is not installed")
    return found


@contextlib.contextmanager
def browsing() -> Iterator[Any]:
    """A playwright browser."""
    path, api = chromium(), needs("playwright.sync_api")
    # Tests may run as root, where Chromium's sandbox does not start; the pages are kvq's own.
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
