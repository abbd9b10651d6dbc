"""Fixtures of the benchmark's tests: the tiny shape's files, and one finished run over it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvq.bench.shapes import assets, make_bundle
from tests.tools.once import once
from tests.tools.packages import needs

MEASURED = ("kvq-fp16", "kvq-mixed", "kvq-adaptive", "kvq-rule", "ort-gqa-fp32", "ort-gqa-int8")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Folder of the tiny shape's files, made once."""
    needs("torch")
    return once(tmp_path_factory, "bench", lambda folder: make_bundle(assets("tiny", folder)))[0]


@pytest.fixture(scope="session")
def measured(cache, tmp_path_factory):
    """A finished run over the tiny shape: stdout, stderr, and the JSON file."""

    def run(folder):
        file = folder / "tiny.json"
        command = [sys.executable, "-m", "kvq.bench.decode", "--shape", "tiny", "--context", "24,48", "--threads", "1"]
        command += ["--arms", ",".join(MEASURED), "--rounds", "2", "--steps", "3", "--prefills", "3"]
        command += ["--cache", str(cache), "--json", str(file), "--plot", str(file.with_suffix(".png"))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    folder, (out, err) = once(tmp_path_factory, "measured", run)
    return out, err, folder / "tiny.json"
