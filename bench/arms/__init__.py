"""Arms of the decode benchmark by name. A new arm is one new module here with an ``ARMS`` dict."""

from __future__ import annotations

import sys

from kvq.bench.arms.base import Arm, ArmSpec, Setup
from kvq.runtime.discovery import discover

_found: dict[str, ArmSpec] = discover(sys.modules[__name__], "ARMS")
# kvq first; the first arm of a run is the one that groups are compared by.
ARMS = dict(sorted(_found.items(), key=lambda item: not item[0].startswith("kvq-")))

__all__ = ["ARMS", "Arm", "ArmSpec", "Setup"]
