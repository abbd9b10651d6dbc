"""What onnxruntime's exceptions are to a user: its errors share no base class, and say in text alone what they are."""

from __future__ import annotations

from kvq.runtime.errors import BundleError, KvqError, MemoryShortageError

# How its allocators, its mapping of files and C++ itself say that there is no memory.
NO_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory", "mmap", "memory map")
LONGEST = 200


def refusal(error: BaseException, what: str, remedy: str, kind: type[KvqError] = BundleError) -> KvqError:
    """An exception of onnxruntime as one of ours, in one line.

    Args:
        error: what it raised; one of ours already is returned as it is.
        what: could not be done.
        remedy: what helps against anything but a lack of memory.
        kind: of the error; a lack of memory is a MemoryShortageError.
    """
    if isinstance(error, KvqError):
        return error
    lines = str(error).strip().splitlines()
    why = "".join(c if c.isprintable() else " " for c in lines[0])[:LONGEST] if lines else type(error).__name__
    if isinstance(error, MemoryError) or any(words in why.lower() for words in NO_MEMORY):
        return MemoryShortageError(f"{what}: not enough memory ({why}); free some, or take a smaller model")
    return kind(f"{what} ({why}); {remedy}")
