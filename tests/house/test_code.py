"""The code itself: lint, format, types, and promises about imports that a reader relies on."""

import os
import subprocess
import sys

import pytest

from tests.tools.packages import needs
from tests.tools.tree import PACKAGES, ROOT


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_types(tmp_path):
    """mypy on the tree as it is installed: the folders below a kvq package."""
    needs("torch"), needs("transformers")  # whose types it reads
    package = tmp_path / "kvq"
    package.mkdir()
    for path in [*(ROOT / "kvq").glob("*.py"), *(ROOT / name for name in PACKAGES)]:
        (package / path.name).symlink_to(path)
    # Nothing reads its cache again, and to write it is a fifth of the work.
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull]
    command = [sys.executable, "-m", "mypy", *options, "-p", "kvq"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_runtime_does_not_import_the_exporter_or_its_tools():
    forbidden = ("kvq.exporter", "torch", "transformers", "optimum")
    for file in (ROOT / "runtime").rglob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert not words[1].startswith(forbidden), f"{file.relative_to(ROOT)}: {line}"


def test_every_folder_is_packaged():
    """A new sub-package must be listed in pyproject.toml, or an installed kvq lacks it."""
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"kvq"} | {
        "kvq." + ".".join(init.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for init in (ROOT / name).rglob("__init__.py")
    }
    assert found == listed
