"""Teams of threads in C, also under the thread sanitizer, which sees every access that nothing orders."""

from __future__ import annotations

import subprocess

import pytest

from tests.tools.native_build import CC, NATIVE, need
from tests.tools.tree import ROOT

PROGRAM = ROOT / "tests" / "native" / "c" / "check_team.c"
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]


@pytest.mark.parametrize(
    ("flags", "rounds"), [(["-O3"], 2000), (["-O1", "-g1", "-fsanitize=thread"], 150)], ids=["fast", "sanitized"]
)
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_every_piece_is_done_once_whoever_comes(flags, rounds, threads, tmp_path):
    need(CC)
    program = tmp_path / "check_team"
    command = [CC, *FLAGS, *flags, str(PROGRAM), str(NATIVE / "team.c"), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    command = [str(program), str(rounds // threads + 1), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if (
        "unexpected memory mapping" in done.stderr
    ):  # older sanitizers cannot run where systems place memory as newer ones do
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "every piece was done once\n"), done.stdout + done.stderr
