"""What the packages below kvq report to their makers: nothing, unless the user asks for it.

Official builds of onnxruntime 1.29 and later collect events (the machine, an identifier of it, the path of Python,
names of graphs, run times, messages of errors), keep them in ~/.cache/Microsoft and send them off from the moment that
onnxruntime is imported. Source: docs/Privacy.md of onnxruntime, and its pull request 27379.
"""

from __future__ import annotations

import os

VARIABLE = "ORT_DISABLE_TELEMETRY"
# Of packages that some extras bring, which count downloads of data sets, even of files on this machine, and report uses
# of a cluster. What is set already decides.
OTHERS = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def refuse() -> None:
    """Turn it off for this process and those it starts; where ORT_DISABLE_TELEMETRY is set already, that decides.

    Has to come before the process imports onnxruntime, which reads the variable then, once.
    """
    if not os.environ.get(VARIABLE):
        os.environ[VARIABLE] = "1"
    for name, value in OTHERS.items():
        os.environ.setdefault(name, value)


def refused() -> bool:
    """Whether the variable turns it off, as onnxruntime understands it."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes")
