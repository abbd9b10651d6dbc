"""What a benchmark ran on: processor, memory, installed versions."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import kvq
from kvq.runtime.machine.threads import available_cores

# Those that decide how fast small integers are multiplied.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")


def machine(*distributions: str) -> dict[str, Any]:
    """Processor, cores, memory, system, versions of distributions that are installed; plain JSON values."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory_gb": round(_kilobytes("/proc/meminfo", "MemTotal") / 1e6, 1),
        "instructions": [name for name in INSTRUCTIONS if name in (_first("/proc/cpuinfo", "flags") or "").split()],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions("kvq", *distributions),
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions: {name: version}; those not found are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = kvq.__version__ if name == "kvq" else version(name)
        except PackageNotFoundError:
            continue
    return found


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    return 1024 * free or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes(process: int | str = "self", peak: bool = False) -> int:
    """Resident memory of a process (its id) now, or the most it ever had.

    Raises:
        RuntimeError: the system does not say.
    """
    if not (found := _kilobytes(f"/proc/{process}/status", "VmHWM" if peak else "VmRSS")):
        raise RuntimeError("memory of a process is measured on Linux only")
    return 1024 * found


def _kilobytes(file: str, key: str) -> int:
    """The first value of a key in kB; 0 where there is none."""
    return int((_first(file, key) or "0 kB").split()[0])


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
