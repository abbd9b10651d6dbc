"""The command line in processes of its own, for tests of any layer."""

from __future__ import annotations

import os
import subprocess
import sys

# A greedy run that always has the same length.
GENERATED = ["-n", "12", "-t", "0", "--ignore-eos"]


def kvq(*arguments, input: str | bytes | None = "", env: dict | None = None) -> subprocess.CompletedProcess:
    """Run ``kvq`` with the arguments; output as text."""
    return command([sys.executable, "-m", "kvq", *map(os.fsdecode, arguments)], input, env)


def command(arguments: list, input: str | bytes | None = "", env: dict | None = None) -> subprocess.CompletedProcess:
    """Run a program with this stdin and these variables beside the environment's; output as text."""
    data = input.encode() if isinstance(input, str) else input
    done = subprocess.run(arguments, input=data, capture_output=True, env={**os.environ, **(env or {})}, timeout=120)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def run(model, *arguments, **options) -> subprocess.CompletedProcess:
    """Run ``kvq run`` on a bundle as `GENERATED` says."""
    return kvq("run", "--model", str(model), *GENERATED, *arguments, **options)


def assert_one_line_error(done: subprocess.CompletedProcess, *words: str, code: int = 1, who: str = "kvq") -> None:
    """Nothing but one line of stderr, with these words in it; who: "Error" tells of wrong usage."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"{who}: ")
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def python(code: str) -> str:
    """stdout of a fresh interpreter."""
    done = command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    return done.stdout


# A line of code that prints the packages imported so far, and those that only exporting and training may import.
LOADED = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "optimum", "safetensors", "huggingface_hub"}
