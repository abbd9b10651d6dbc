"""Other programs at work for us: waited for, with a look at how far they are, and ended where we go on without them."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# progress(what, done, total): bytes; total is None where it is not known.
Progress = Callable[[str, int, int | None], None]
POLL_S = 0.2


def finished(
    command: Sequence[str],
    environment: Mapping[str, str],
    look: Callable[[], None],
    *,
    folder: Path | None = None,
    errors_alone: bool = False,
    attended: bool = False,
) -> tuple[int, str]:
    """Run a program to its end.

    Args:
        command: its words.
        environment: all of its variables.
        look: called five times a second meanwhile; where it raises, the program is killed.
        folder: where it works; None is the current one.
        errors_alone: leave out what it writes to stdout.
        attended: its stdin is a pipe that ends with this process, even a killed one; it has to look at that itself,
            as `kvq.runtime.cli.attended` does. Others find stdin empty.

    Returns:
        exit code, and what it has written to stdout and stderr.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=output,
            stdin=subprocess.PIPE if attended else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if errors_alone else output,
        )  # fmt: skip
        try:
            while process.poll() is None:
                look()
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        output.seek(0)
        return process.returncode, output.read().decode(errors="replace")
