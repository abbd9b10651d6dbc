"""Hours of changed inputs for every target, without a fuzzer: ``python -m tests.fuzz.long SECONDS [SEED]``.

What was run is added to tests/fuzz/runs.json; an input that fails is shown, and ends it.
"""

from __future__ import annotations

import random
import sys
import time

from tests.fuzz.targets import PIECES, SEEDS, TARGETS, changed, held
from tests.tools.counts import Run, record
from tests.tools.work import bounded_work


def mutant(name: str, draw: random.Random) -> bytes:
    """A seed of a target, changed."""
    changes = [
        (draw.random(), draw.randint(0, 12), draw.choice(PIECES) if draw.random() < 0.5 else draw.randbytes(4))
        for _ in range(draw.randint(0, 6))
    ]
    return changed(draw.choice(SEEDS[name]), changes, draw.random() if draw.random() < 0.1 else None)


def main() -> None:
    """Run every target for so long."""
    seconds = float(sys.argv[1])
    draw = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns())
    for name in TARGETS:
        count, begun = 0, time.monotonic()
        while (took := time.monotonic() - begun) < seconds:
            data = mutant(name, draw)
            try:
                with bounded_work():
                    held(name, data)
            except BaseException:
                print(f"{name}, after {count}: {data!r}")
                raise
            count += 1
        record(Run(f"changed at random: {name}", count, round(took, 1), "python -m tests.fuzz.long SECONDS"))
        print(f"{name}: {count} in {took:.0f} s")


if __name__ == "__main__":
    main()
