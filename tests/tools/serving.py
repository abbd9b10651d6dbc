"""A `kvq serve` process of its own, for tests and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai

START_S = 120
LONG = (
    "The harbour lay in the first light of a grey morning, and the boats that had gone out in the night were coming"
    " home one after another, heavy and slow. On the quay the women were waiting with their baskets. Nobody spoke much."
    " The captain of the largest boat stood at the rail and counted the houses on the hill, as he did every time. "
)
QUESTION = [{"role": "user", "content": "Where is the captain?"}]
JSON = {"content-type": "application/json"}
HTML_PAGE = {"accept": "text/html"}


class Served:
    """A running server. stderr is collected line by line in `lines`."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvq", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"listening on (http://\S+?),")[1]

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str) -> re.Match:
        """The first line of stderr that matches."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                self._reader.join()
                if not any(re.search(pattern, line) for line in self.lines):
                    raise AssertionError(f"the server ended with {self.process.returncode}: {self.lines}")
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.lines}")

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=START_S)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=START_S, **options)

    def post(self, path: str, body: dict | None = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=START_S, **options)

    def stats(self) -> dict:
        return self.get("/stats").json()

    def until(self, **expected) -> dict:
        """Wait until /stats shows these values."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            stats = self.stats()
            if all(stats[name] == value for name, value in expected.items()):
                return stats
            time.sleep(0.02)
        raise AssertionError(f"{stats} never became {expected}")

    def end(self, by: int = signal.SIGTERM) -> int:
        """Exit code after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        code = self.process.wait(START_S)
        self._reader.join()
        return code


@contextlib.contextmanager
def served(*arguments: str | Path, ready: bool = True, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server that is there inside the block."""
    server = Served(*map(str, arguments), env=env)
    try:
        if ready:
            server.wait_for("^kvq: ready")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server._reader.join()
        server.process.stdout.close()
        server.process.stderr.close()


def library(model, prompt, policy=None, **options):
    """The text that the library alone generates."""
    return "".join(r.text for r in model.session(policy).generate(prompt, **options))
