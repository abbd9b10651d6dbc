"""``kvq batch`` killed again and again: in the end every answer is there once, and is the library's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.tools.batches import assert_answered, lines_of, requests_file
from tests.tools.command_line import kvq

PROMPTS, KILLS = 500, 20
PER_RUN = PROMPTS // KILLS - 3  # most answers that are waited for before a kill: some are left for the last run


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_five_hundred_prompts_killed_at_twenty_moments(tiny_bundle, tiny_model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = requests_file(source, PROMPTS)
    arguments = [sys.executable, "-m", "kvq", "batch", "-q", "-m", str(tiny_bundle), str(source), str(out)]
    draw = random.Random(23)
    killed, torn = 0, 0
    for _ in range(KILLS):
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        until = lines_of(out) + draw.randrange(PER_RUN)
        while process.poll() is None and lines_of(out) < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        torn += 0 < lines_of(out) < PROMPTS
    assert killed == KILLS
    assert torn >= KILLS // 2  # most fell while answers were written
    done = kvq("batch", "-m", tiny_bundle, source, out)
    assert done.returncode == 0, done.stderr
    assert_answered(out, prompts, tiny_model)
