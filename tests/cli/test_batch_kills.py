"""``kvq batch`` killed again and again: in the end every answer is there once, and is the library's."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvq.runtime.server.batch import seed_of
from tests.tools.command_line import kvq
from tests.tools.serving import library

PROMPTS, KILLS, TOKENS = 500, 20, 2
PER_RUN = PROMPTS // KILLS - 3  # most answers that are waited for before a kill: some are left for the last run


def lines_of(path: Path) -> int:
    """Whole lines so far."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().count(b"\n")
    return 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_five_hundred_prompts_killed_at_twenty_moments(tiny_bundle, tiny_model, tmp_path):
    prompts = {f"line {number}": f"The ship {number} went" for number in range(PROMPTS)}
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"max_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}
    source.write_text(
        "".join(
            json.dumps(
                {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **body}}
            )
            + "\n"
            for custom_id, prompt in prompts.items()
        )
    )
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
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(prompts)
    for answer in answers:
        custom_id = answer["custom_id"]
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        alone = library(tiny_model, prompts[custom_id], "int8", seed=seed_of(custom_id), **body)
        assert answer["response"]["body"]["choices"][0]["text"] == alone, custom_id
