"""The parent's end of a process that is measured."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import click

import kvq

TIMEOUT = 3600.0  # seconds; filling a long cache takes some arms minutes
CHILD = Path(__file__).with_name("child.py")


class ChildError(click.ClickException):
    """What a process was asked for failed; one line says how."""


class Child:
    """A process of its own for an object, see `kvq.bench.child`; it ends with the block.

    Args:
        target: what makes the object, as module:name or file.py:name.
        job: keyword arguments for that, JSON values.
        threads: of libraries that read OMP_NUM_THREADS.
        checkout: folder whose kvq is imported; None is this one's.
    """

    def __init__(self, target: str, job: dict[str, Any], threads: int | None = None, checkout: Path | None = None):
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        first = str(checkout or Path(kvq.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [first, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-P", str(CHILD), target, json.dumps(job)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, text=True
        )
        self._to, self._from = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ChildError: it failed, or the process ended.
        """
        line = ""
        try:
            self._to.write(json.dumps({"do": do, **arguments}) + "\n")
            self._to.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._from, selectors.EVENT_READ)
                if not selector.select(TIMEOUT):
                    raise ChildError(f"{do} took more than {TIMEOUT:.0f} s")
            line = self._from.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self._process.wait()
            raise ChildError(f"its process ended with code {code} during {do}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{do} failed: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time used so far by all threads of the process."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1][:300] if lines else "no message"
