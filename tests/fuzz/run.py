"""Coverage-guided fuzzing of a target: ``python -m tests.fuzz.run TARGET [SECONDS]``; atheris has to be installed.

The last lines say how many executions there were. A crash leaves its input in the present folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvq", "json", "jinja2"]):
    from tests.fuzz.targets import SEEDS, held


def main() -> None:
    """Fuzz until the time is over, or until something else than a refusal comes out."""
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS[name]):
            (Path(folder) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=60", "-rss_limit_mb=2048", folder]
        atheris.Setup([sys.argv[0], *options], lambda data: held(name, data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
