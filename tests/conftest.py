"""Fixtures shared by all tests: one small checkpoint, its fp32 bundle, and the model loaded from it."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

import kvq
from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.session.model import Model
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.real import real_bundle, real_home  # noqa: F401 # fixtures for all tests

# Where a landing is decided, the same examples every time; everywhere else, new ones every run.
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=50)
if os.environ.get("CI") or os.environ.get("KVQ_CI"):
    hypothesis.settings.load_profile("ci")

# pytest-xdist tells its workers how wide its own terminal is; commands that are tested would wrap what they print.
os.environ.pop("COLUMNS", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`."""
    parser.addoption("--quick", action="store_true", help="the first case of every test that is not slow")


# Files that take minutes: they begin first, so that none of two processes waits for the other one at the end.
LONGEST = (
    "real/test_real_model.py",
    "native/test_native_c.py",
    "native/test_sanitized.py",
    "bench/test_decode.py",
    "exporter/test_families.py",
    "policy/test_budget.py",
    "house/test_adding.py",
    "house/test_code.py",
    "exporter/test_few_bits.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; with `--quick`, leave out slow tests and all cases of a test but its first."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if not config.getoption("--quick"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            first.setdefault(item.nodeid.partition("[")[0], item)
    kept = list(first.values())
    left_out = set(map(id, items)) - set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = kept


# Random weights say anything: one word for ever, or special tokens, which no conversation of a real model has within a
# reply. These say text, and different things to different prompts.
SEED = 20


@pytest.fixture(scope="session", autouse=True)
def no_models_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The default model is the embedded one, whatever has been pulled on this machine."""
    os.environ["KVQ_HOME"] = str(tmp_path_factory.mktemp("kvq-home"))
    os.environ.pop("KVQ_MODEL", None)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the TINY checkpoint with a tokenizer. Read only: copy it to change it."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", TINY, seed=SEED)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the fp32 bundle of `tiny_checkpoint`, rotated and centred. Read only."""
    return export(str(tiny_checkpoint), tmp_path_factory.mktemp("bundle") / "tiny", weights="fp32").path


@pytest.fixture(scope="session")
def embedded() -> Model:
    """The model that comes with kvq, which has trained controllers; make a session per test."""
    return kvq.load("kvq-books")


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Model:
    """The loaded model of `tiny_bundle`; make a session per test."""
    return open_bundle(tiny_bundle)
