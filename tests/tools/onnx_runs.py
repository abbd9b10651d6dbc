"""Runs graphs in a process of its own, with a deadline and a limit on memory: a crash is told, not suffered.

As a program: folder of weights.bin, then graph files; for each a line with its name before and what came of it after.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKENS = 3
MEMORY = 2 << 30  # beyond what the process has when it starts
SECONDS = 60


def outcomes(files: list[Path], folder: Path, library: Path | None = None) -> dict[str, str]:
    """File name -> "ran", or onnxruntime's error.

    Raises:
        AssertionError: the process died, or took too long; with the file that it was at.
    """
    command = [sys.executable, __file__, str(folder), str(library or ""), *map(str, files)]
    told: dict[str, str] = {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        output, code, said = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        output, code, said = (error.stdout or b"").decode(), "deadline", ""
    for line in output.splitlines():
        told.update(json.loads(line))
    assert (code, len(told)) == (0, len(files)), f"{code} at {list(told)[-1:]}: {said[-500:]}"
    return told


def main() -> None:
    """Load and run every graph once, on small numbers."""
    import resource

    import onnxruntime

    folder, library, *files = sys.argv[1:]
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    onnxruntime.set_default_logger_severity(4)
    for file in files:
        print(json.dumps({Path(file).name: "started"}), flush=True)
        try:
            _run(onnxruntime, Path(file).read_bytes(), folder, library)
            told = "ran"
        except Exception as error:  # onnxruntime's share no base class
            told = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({Path(file).name: told}), flush=True)


def _run(onnxruntime: Any, graph: bytes, folder: str, library: str) -> None:
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        shape = [TOKENS if isinstance(size, str) else size for size in value.shape]
        feeds[value.name] = np.ones(shape, np.int64 if "int64" in value.type else np.float32)
    if library:  # its attention asks for a session's pass: loading is all there is to see
        return
    for value, result in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        assert list(result.shape) == [TOKENS if isinstance(size, str) else size for size in value.shape], value.name


if __name__ == "__main__":
    main()
