"""The parent's end of an arm's process."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from typing import Any

TIMEOUT = 3600.0  # seconds; filling a long cache takes some arms minutes


class ArmError(Exception):
    """An arm failed; one line says how."""


class ArmProcess:
    """An arm in a process of its own.

    Args:
        job: what `kvq.bench.child` takes: arm, shape, folder (of the shape's files), threads, backend, exact.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.arm = job["arm"]
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvq.bench.child", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            bufsize=1,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ArmError: the arm failed, or its process ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(TIMEOUT):
                    raise ArmError(f"{do} took more than {TIMEOUT:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            raise ArmError(f"its process ended with code {self._process.returncode} during {do}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ArmError(f"{do} failed: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time used so far by all threads of the process."""
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1][:300] if lines else "no message"
