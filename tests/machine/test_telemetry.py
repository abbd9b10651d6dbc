"""Nothing about the user leaves the machine, or is kept to be sent: what onnxruntime would collect is turned off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvq.runtime.machine import telemetry
from tests.tools.tree import ROOT

# What onnxruntime takes for a sign that it is being tested, and keeps quiet then by itself.
TESTED = ("CI", "ORT_RUNNING_UNIT_TESTS", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "GITLAB_CI", "CIRCLECI")
TALK = [sys.executable, "-m", "kvq", "run", "-m", "kvq-books", "-n", "2", "Once upon a time"]
EMBEDDED = [sys.executable, "-c", "import kvq; kvq.load('kvq-books').session().append([1, 2, 3])"]
ALONE = [sys.executable, "-c", "import onnxruntime"]


def left_behind(command, home, setting):
    """Files of onnxruntime's that a process left in its user's home."""
    kept = {name: value for name, value in os.environ.items() if name not in (*TESTED, telemetry.VARIABLE)}
    kept |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "USERPROFILE": str(home)}
    kept |= {} if setting is None else {telemetry.VARIABLE: setting}
    done = subprocess.run(command, env=kept, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [path for path in home.rglob("*") if "onnxruntime" in path.name]


COMMANDS = pytest.mark.parametrize("command", [TALK, EMBEDDED], ids=["kvq run", "import kvq"])


@COMMANDS
@pytest.mark.parametrize("setting", [None, "", "1", "true"])
def test_onnxruntime_collects_nothing(command, setting, tmp_path):
    assert left_behind(command, tmp_path, setting) == []


@COMMANDS
def test_whoever_wants_it_has_it(command, tmp_path):
    if not left_behind(ALONE, tmp_path / "alone", None):
        pytest.skip("this build of onnxruntime collects nothing at all")
    assert left_behind(command, tmp_path / "kvq", "0")


def test_packages_of_extras_are_asked_for_the_same_and_the_user_decides(monkeypatch):
    for name in telemetry.OTHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    telemetry.refuse()
    found = {name: os.environ[name] for name in telemetry.OTHERS}
    assert found == telemetry.OTHERS | {"RAY_USAGE_STATS_ENABLED": "1"}


@pytest.mark.parametrize(
    ("before", "after"), [(None, "1"), ("", "1"), ("0", "0"), ("1", "1"), ("Yes", "Yes"), ("off", "off")]
)
def test_what_is_set_already_decides(before, after, monkeypatch):
    monkeypatch.delenv(telemetry.VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(telemetry.VARIABLE, before)
    telemetry.refuse()
    assert os.environ[telemetry.VARIABLE] == after
    assert telemetry.refused() == (after in ("1", "Yes"))
