"""Inspections that are shown in every form."""

from __future__ import annotations

import pytest

from kvq.runtime.inspect.inspection import inspect_text
from tests.tools.inspected import HOSTILE, TEXT


@pytest.fixture(scope="session")
def mixed(tiny_model):
    """An inspection in which every token's precision is known: 16, 8, 4, 2 bits in turn."""
    return inspect_text(tiny_model, TEXT, "mixed", recent=4, sink=0)


@pytest.fixture(scope="session")
def hostile(tiny_model):
    """An inspection of a text that would act on whatever shows it."""
    return inspect_text(tiny_model, HOSTILE, "mixed")
