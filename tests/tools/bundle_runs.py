"""Loads a bundle with one graph after another in it, as a user would, in a process of its own with a deadline.

As a program: folder of a bundle that may be changed, name of its graph, files to put there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

SECONDS = 120
MEMORY = 2 << 30


def outcomes(files: list[Path], bundle: Path, graph: str, backend: str) -> dict[str, str]:
    """File name -> "ran", or the name of kvq's own error.

    Raises:
        AssertionError: another exception, or the process died, or took too long; with the file that it was at.
    """
    command = [sys.executable, "-m", "tests.tools.bundle_runs", str(bundle), graph, *map(str, files)]
    told: dict[str, str] = {}
    environment = os.environ | {"KVQ_BACKEND": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
        output, code, said = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        output, code, said = (error.stdout or b"").decode(), "deadline", ""
    for line in output.splitlines():
        told.update(json.loads(line))
    assert (code, len(told)) == (0, len(files)), f"{code} at {list(told)[-1:]}: {said[-800:]}"
    return told


def main() -> None:
    """Put each file in its place, load the bundle, read a few tokens."""
    from kvq.composition import open_bundle
    from kvq.runtime.errors import KvqError
    from tests.tools.bundles import relist

    bundle, graph, *files = sys.argv[1:]
    folder = Path(bundle)
    if (status := Path("/proc/self/statm")).exists():
        import resource

        most = int(status.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for file in files:
        print(json.dumps({Path(file).name: "started"}), flush=True)
        (folder / graph).write_bytes(Path(file).read_bytes())
        relist(folder, graph)
        told = "ran"
        try:
            model = open_bundle(folder)
            if graph.startswith("controller"):
                with contextlib.suppress(AttributeError):
                    model.policy("paper" if "paper" in graph else "adaptive")
            else:
                session = model.session()
                session.append([1, 2, 3])
                session.append([4])
        except KvqError as error:
            told = type(error).__name__
        print(json.dumps({Path(file).name: told}), flush=True)


if __name__ == "__main__":
    main()
