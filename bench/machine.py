"""What a benchmark ran on."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import kvq
from kvq.bench.arms.base import package_version
from kvq.runtime.machine.threads import available_cores


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and versions; plain JSON values."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory_gb": round(int((_first("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 1e6, 1),
        "instructions": [name for name in INSTRUCTIONS if name in (_first("/proc/cpuinfo", "flags") or "").split()],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {"kvq": kvq.__version__} | package_version(*PACKAGES),
    }


PACKAGES = (
    "onnxruntime", "numpy", "torch", "transformers", "optimum-quanto", "llama-cpp-python",
    "onnxruntime-genai", "openvino", "nncf",
)  # fmt: skip
# Those that decide how fast small integers are multiplied.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")


def _first(file: str, key: str) -> str | None:
    """The first value of a `key: value` file of the kernel."""
    try:
        with open(file) as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return None
