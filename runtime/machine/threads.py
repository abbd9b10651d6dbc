"""onnxruntime's thread pool: one for the whole process, shared by all segments."""

from __future__ import annotations

import os
import threading

import onnxruntime

from kvq.runtime.errors import BackendError
from kvq.runtime.machine import telemetry

MOST_THREADS = 256  # spinning threads far beyond the cores do not come to an end

_lock = threading.Lock()
_threads: int | None = None


def available_cores() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def session_options() -> onnxruntime.SessionOptions:
    """Options for any onnxruntime session in a process that runs kvq: it has to use the global pool too."""
    configure(None)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return options


def configure(threads: int | None) -> int:
    """Set the size of the pool on first use; return the size in force.

    A pool per segment would start (layers + 2) * threads threads that spin against each other,
    so all segments share onnxruntime's global one, whose size is fixed once made.

    Raises:
        BackendError: threads out of range, or another number was set before in this process.
    """
    global _threads
    with _lock:
        if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS):
            raise BackendError(f"threads must be at least 1 and at most {MOST_THREADS}, got {threads!r:.60}")
        if _threads is None:
            count = threads or available_cores()
            onnxruntime.set_global_thread_pool_sizes(count, 1)
            if telemetry.refused():  # for Windows, and where an application had imported onnxruntime before kvq
                onnxruntime.disable_telemetry_events()
            _threads = count
        if threads not in (None, _threads):
            raise BackendError(
                f"this process already runs models on {_threads} threads, cannot change to {threads};"
                " start another process, or load every model with the same number"
            )
        return _threads
