"""The process of one arm: reads requests, one JSON object a line, and answers each with one.

    python -m kvq.bench.child '{"arm": "kvq-fp16", "shape": "smollm-135m", ...}'

Requests: {"do": "prepare" | "load" | "check" | "prefill" | "steps" | "report"}; an error is answered with
{"error": "..."} and ends the process. Standard output belongs to the protocol alone: what libraries
print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    server = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            server = server or Server(job)
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # an arm may fail in any way a library can
            text = " ".join(str(error).split())[:400]
            answers.write(json.dumps({"error": f"{type(error).__name__}: {text}"}) + "\n")
            raise
        answers.write(json.dumps(answer) + "\n")


class Server:
    """The requests by name."""

    def __init__(self, job: dict[str, Any]) -> None:
        from kvq.bench.arms import ARMS, Setup
        from kvq.bench.shapes import assets

        folder = Path(job["folder"])
        self.assets = replace(assets(job["shape"], folder.parent, job["exact"]), folder=folder)
        self.arm = ARMS[job["arm"]].make(Setup(self.assets, job["threads"], job["backend"]))

    def prepare(self) -> dict[str, Any]:
        """Make the files the arm reads."""
        from kvq.bench.shapes import make_bundle

        make_bundle(self.assets)
        self.arm.prepare()
        return {}

    def load(self) -> dict[str, Any]:
        """Load the weights."""
        self.arm.load()
        return {}

    def check(self, prompt: list[int], steps: list[int], out: str) -> dict[str, Any]:
        """Write the logits after the prompt and after each step to `out`, float32 [1 + steps, vocab]."""
        self.arm.open(len(prompt) + len(steps))
        self.arm.prefill(np.asarray(prompt, np.int64))
        rows = [self.arm.logits().copy()]
        for token in steps:
            self.arm.step(token)
            rows.append(self.arm.logits().copy())
        np.save(out, np.stack(rows))
        return {}

    def prefill(self, ids: list[int], room: int) -> dict[str, Any]:
        """Start over with these tokens and room for more; {"seconds"}."""
        self.arm.open(len(ids) + room)
        return {"seconds": self.arm.prefill(np.asarray(ids, np.int64))}

    def steps(self, ids: list[int]) -> dict[str, Any]:
        """Decode steps; {"seconds": of each, "policy_seconds": of each, or None}."""
        seconds = [self.arm.step(token) for token in ids]
        policy = self.arm.policy_seconds
        return {"seconds": seconds, "policy_seconds": policy and policy[-len(ids) :]}

    def report(self) -> dict[str, Any]:
        """Bytes and description."""
        return {
            "kv_bytes": self.arm.kv_bytes(),
            "cache_read_bytes": self.arm.cache_read_bytes(),
            "weight_bytes": self.arm.weight_bytes(),
            "peak_rss_bytes": peak_rss_bytes(),
            "details": self.arm.describe(),
        }


def peak_rss_bytes() -> int:
    """Largest resident memory this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: peak memory is measured on Linux only")


if __name__ == "__main__":
    main()
