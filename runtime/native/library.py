"""Load the native library and declare its functions; structures, errors and limits are those of kvq.h."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import numpy as np

from kvq.runtime.errors import BackendError, NonFiniteError
from kvq.runtime.precision.codecs import CODECS, Codec
from kvq.runtime.precision.codecs.base import WORD_BYTES

ABI = 22
CHUNK_SLOTS = 1024  # most slots of a row of the page table
MOST_CHANNELS = 1024  # largest head_dim
NO_MEMORY, REFUSED_VALUE = -1, -8  # the errors that are not the backend's
FILE = Path(__file__).with_name("libkvq.so")

# kvq_page
PAGE = np.dtype(
    [(name, np.uint64) for name in ("keys", "key_scales", "values", "value_scales")]
    + [(name, np.int32) for name in ("key_precision", "value_precision")]
    + [(name, np.int32) for name in ("capacity", "begin", "end", "first", "count", "period", "narrow", "unused")]
    + [("positions", np.uint64), ("layers", np.uint64)]
)
# kvq_layer_arrays
LAYER = np.dtype(
    [(name, np.uint64) for name in ("keys", "key_scales", "values", "value_scales")]
    + [(name, np.int32) for name in ("key_precision", "value_precision")]
)


class Pass(ctypes.Structure):
    """kvq_pass: what one session has of a forward pass; next: address of the next one's, or None."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("tokens", "pages", "kernel", "threads")),
        *((name, ctypes.c_void_p) for name in ("page", "keys", "values", "row_squares", "stepwise", "next", "windows")),
        ("position", ctypes.c_int32),
        ("turns", ctypes.c_void_p),
    )


class Turns(ctypes.Structure):
    """kvq_turns: what keys of few bits are stored less."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("vectors", "across", "waves", "which")),
        *((name, ctypes.c_int32) for name in ("sets", "rows", "blocks")),
    )


class Rows(ctypes.Structure):
    """kvq_rows: the new tokens of one layer."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_ssize_t) for name in ("query_stride", "key_stride", "value_stride")),
        ("row_squares", ctypes.c_void_p),
    )


class MoveStep(ctypes.Structure):
    """kvq_move_step: what happens with one new token."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("window_slot", "page", "page_slot"))


class Moves(ctypes.Structure):
    """kvq_move: the way of new tokens through the store."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "kv_heads", "head_dim", "kernel", "tokens", "pages")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "feedback", "window", "page", "step", "turned")),
        *((name, ctypes.c_int32) for name in ("first_block", "turn_blocks")),
        ("reach", ctypes.c_float),
    )


class Matrix(ctypes.Structure):
    """kvq_matrix: a matrix of quantized weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "offsets")),
        *((name, ctypes.c_int32) for name in ("n", "k", "blocks", "bits", "block", "halves")),
    )


class Step(ctypes.Structure):
    """kvq_step: what a chain does next with its rows."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("kind", "block")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("layer", "rotate", "inputs")),
    )


class Chain(ctypes.Structure):
    """kvq_chain: steps that follow one another."""

    _fields_ = (
        ("step", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("steps", "kernel", "threads", "unused")),
    )


@functools.cache
def load() -> ctypes.CDLL:
    """The library, its functions declared.

    Raises:
        BackendError: it was not built, does not load here, or is of another version.
    """
    if not FILE.exists():
        raise BackendError(
            "the native library was not built: install kvq from source where a C compiler is (cc, gcc or clang)"
        )
    try:
        library = ctypes.CDLL(str(FILE))
        abi = library.kvq_abi()
        if abi == ABI:
            _declare(library)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{FILE.name} cannot be loaded ({error}); install kvq again") from None
    if abi != ABI:
        raise BackendError(f"{FILE.name} is of version {abi}, this kvq needs {ABI}; install kvq again")
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Types of the functions of kvq.h."""
    number, size, address, floats = ctypes.c_int32, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
    library.kvq_kernel_name.restype = library.kvq_error_text.restype = ctypes.c_char_p
    library.kvq_knows.argtypes = (number, number, number)
    library.kvq_words.argtypes = (number, number)
    library.kvq_attend.argtypes = (ctypes.POINTER(Pass), number, ctypes.POINTER(Rows), address, address)
    library.kvq_encode.argtypes = (number, number, floats, size, number, floats, size, address, address)
    library.kvq_move_tokens.argtypes = (ctypes.POINTER(Moves),)
    library.kvq_movable.argtypes = (ctypes.POINTER(Moves),)
    library.kvq_within.argtypes = (number, floats, size, ctypes.c_float)
    library.kvq_pack.argtypes = (number, ctypes.POINTER(Matrix), ctypes.POINTER(Matrix))
    library.kvq_set_move.argtypes = (ctypes.POINTER(Moves),)
    library.kvq_set_pass.argtypes = (ctypes.POINTER(Pass),)


def error_of(status: int) -> Exception:
    """What an error of kvq.h, below 0, stands for, in one line with what to do: a `BackendError`, but MemoryError for
    want of memory and NonFiniteError for values that nothing can store.
    """
    kinds: dict[int, type[Exception]] = {NO_MEMORY: MemoryError, REFUSED_VALUE: NonFiniteError}
    text = load().kvq_error_text(status).decode() or f"error {status} of {FILE.name}; install kvq again"
    return kinds.get(status, BackendError)(text)


def check(status: int) -> int:
    """What a function of the library returned, unless it is an error.

    Raises:
        BackendError, MemoryError, NonFiniteError: it is, see `error_of`.
    """
    if status < 0:
        raise error_of(status)
    return status


def knows(codec: Codec) -> bool:
    """Whether the library reads and writes the vectors of a codec as they lie: it has kernels for the precision, which
    mean the same codes by it.
    """
    library, id_ = load(), codec.precision.id
    if not library.kvq_knows(id_, codec.bits, codec.has_scale):
        return False
    return all(WORD_BYTES * library.kvq_words(id_, d) == codec.code_bytes(d) for d in (8, 64, 80, MOST_CHANNELS))


def known_precisions() -> frozenset[int]:
    """Ids of the precisions of pages that the library has kernels for; the others are numpy's."""
    return frozenset(id_ for id_, codec in CODECS.items() if knows(codec))


def kernels() -> dict[str, int]:
    """Instruction sets that this machine can run, slowest first: name -> index."""
    library = load()
    return {
        library.kvq_kernel_name(i).decode(): i for i in range(library.kvq_kernels()) if library.kvq_kernel_available(i)
    }


def choose_kernel() -> tuple[str, int]:
    """Name and index of the instruction set to use: KVQ_NATIVE_ISA, or the best one.

    Raises:
        BackendError: KVQ_NATIVE_ISA names one that this machine or build does not have.
    """
    available = kernels()
    name = os.environ.get("KVQ_NATIVE_ISA") or list(available)[-1]
    if name not in available:
        raise BackendError(f"KVQ_NATIVE_ISA={name} is not one this machine can run: {', '.join(available)}")
    return name, available[name]
