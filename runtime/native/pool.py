"""Work of the library beside a pass, on onnxruntime's threads: a graph of one operator that does it.

A second pool would not do: threads of onnxruntime spin for a while when a pass is over, and where they are as many as
the cores, others get half of one.
"""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime

from kvq.runtime.bundle.onnx_file import FLOAT32, IR_VERSION, OPSETS
from kvq.runtime.bundle.wire import DELIMITED, VARINT, field, varint
from kvq.runtime.machine.threads import session_options
from kvq.runtime.native.library import FILE, Moves, check, load

DOMAIN, MOVE = b"kvq", b"Move"
NOTHING = np.zeros((1, 1), np.float32)


def move_on_pool(move: Moves) -> None:
    """kvq_move_tokens, its layers shared by onnxruntime's threads.

    Raises:
        BackendError, MemoryError: as of kvq_move_tokens.
    """
    library = load()
    check(library.kvq_set_move(move))
    try:
        _session().run(None, {"x": NOTHING})
    except Exception:  # onnxruntime's errors share no base class
        check(library.kvq_set_move(None))
        raise
    finally:
        library.kvq_set_move(None)


@functools.cache
def _session() -> onnxruntime.InferenceSession:
    options = session_options()
    options.register_custom_ops_library(str(FILE))
    return onnxruntime.InferenceSession(_graph(), options, providers=["CPUExecutionProvider"])


def _graph() -> bytes:
    """An ONNX file: x -> Move -> y, float32 [1, 1] both. Field numbers are those of onnx.proto."""

    def text(number: int, content: bytes) -> bytes:
        return field(number, DELIMITED, content)

    def whole(number: int, value: int) -> bytes:
        return field(number, VARINT, varint(value))

    one = text(1, whole(1, 1))  # a dimension
    tensor = text(2, text(1, whole(1, FLOAT32) + text(2, one + one)))
    node = text(1, b"x") + text(2, b"y") + text(3, b"move") + text(4, MOVE) + text(7, DOMAIN)
    graph = text(1, node) + text(2, b"move") + text(11, text(1, b"x") + tensor) + text(12, text(1, b"y") + tensor)
    opsets = (text(8, text(1, name.encode()) + whole(2, version)) for name, version in OPSETS.items())
    return whole(1, IR_VERSION) + text(7, graph) + b"".join(opsets)
