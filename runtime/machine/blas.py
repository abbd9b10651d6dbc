"""Keep numpy's BLAS to one thread while onnxruntime's pool owns the cores.

The products of attention are small, and between two of them onnxruntime's threads spin: OpenBLAS
with a pool of its own halves the prefill speed (135M shape, 2 cores: 251 against 529 tokens/s).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_controller: ThreadpoolController | None = None
_limit = None
_users = 0


@contextmanager
def one_thread() -> Iterator[None]:
    """One BLAS thread in this process inside the block.

    The limit is the process's, so blocks of several threads share one: the first sets it, the last
    restores what the host program had.
    """
    global _controller, _limit, _users
    with _lock:
        _users += 1
        if _users == 1:
            _controller = _controller or ThreadpoolController()
            _limit = _controller.limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _limit is not None:
                _limit.restore_original_limits()
                _limit = None
