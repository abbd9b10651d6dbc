"""Put memory that every step reads whole on huge pages, where the system is Linux and allows it.

A decode step reads weights and cache once, gigabytes a second; with pages of 4 KB each of them costs a walk through the
page tables. The memory is malloc's, in pieces of less than a huge page, so it is not enough to ask before it is
used: the pages that are there are brought together by `madvise(MADV_COLLAPSE)` (Linux 6.1), 0.3 ms a megabyte.
Contents and addresses stay as they are. KVQ_HUGE_PAGES=off leaves memory alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvq.runtime.errors import BackendError

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on ARM with pages of 4 KB
SLAB = 32 << 20  # bytes of address space
LEAST_CUT = 16 << 10  # bytes; smaller arrays are malloc's
ALIGNMENT = 64  # bytes, a cache line
GAP = 64 << 10  # bytes of others' memory between two pieces that are still taken as one
SETTINGS = ("auto", "off")

_MADV_COLLAPSE = 25
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")

Range = tuple[int, int]  # addresses [begin, end)


def wanted() -> bool:
    """Whether huge pages are to be used: KVQ_HUGE_PAGES, and what the system's administrator says.

    Raises:
        BackendError: KVQ_HUGE_PAGES is not a known setting.
    """
    setting = os.environ.get("KVQ_HUGE_PAGES") or "auto"
    if setting not in SETTINGS:
        raise BackendError(f"KVQ_HUGE_PAGES={setting} is not known; use {' or '.join(SETTINGS)}")
    try:
        return setting == "auto" and sys.platform == "linux" and "[never]" not in _SYSTEM.read_text()
    except OSError:
        return False


def collapse(ranges: Iterable[Range]) -> int:
    """Put memory on huge pages; bytes of whole huge pages for which the system has done so, or it was so before.

    Nothing is advised for what comes to be there later: a heap that shrinks and grows would pay for it.
    """
    done = 0
    for begin, end in whole_pages(ranges):
        if _madvise(begin, end - begin, _MADV_COLLAPSE):
            done += end - begin
        else:  # not everywhere: find out where
            done += sum(HUGE_PAGE * _madvise(at, HUGE_PAGE, _MADV_COLLAPSE) for at in range(begin, end, HUGE_PAGE))
    return done


class _Slab:
    """A mapping that arrays are cut from, one after the other; it goes when the last of them does."""

    def __init__(self) -> None:
        self.mapping = mmap.mmap(-1, SLAB, **_PRIVATE)
        self.used = 0


_lock = threading.Lock()
_slab: _Slab | None = None


def zeros(shape: tuple[int, ...], dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """An array of zeros for what every step reads. Large ones lie side by side, so that whole huge pages come about:
    malloc would put the temporaries of whatever else goes on between them. Memory is taken when it is written.
    """
    global _slab
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not LEAST_CUT <= nbytes <= SLAB or not hasattr(mmap, "MADV_DONTNEED"):
        return np.zeros(shape, dtype)
    with _lock:
        if _slab is None or _slab.used + nbytes > SLAB:
            try:
                _slab = _Slab()
            except OSError:  # no room for a whole slab: there may be for this one, and else it is a MemoryError
                return np.zeros(shape, dtype)
        mapping, begin = _slab.mapping, _slab.used
        _slab.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
    cut = np.frombuffer(mapping, np.uint8, nbytes, begin)
    weakref.finalize(cut, _give_back, mapping, begin, begin + nbytes).atexit = False
    return cut.view(dtype).reshape(shape)


def block(nbytes: int) -> np.ndarray:
    """uint8 zeros [nbytes] in a mapping of their own, to be put on huge pages as it is filled."""
    mapping = mmap.mmap(-1, max(1, nbytes), **_PRIVATE)
    if nbytes >= HUGE_PAGE and wanted() and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8, nbytes)


def _give_back(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Whole pages of a cut that nobody holds any more: the mapping stays as long as another cut of it is in use."""
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@contextmanager
def new_memory() -> Iterator[list[int]]:
    """Put what the process comes to hold within the block on huge pages; [bytes done] once the block has ended."""
    done = [0]
    before = _anonymous() if wanted() else None
    yield done
    if before is not None:
        done[0] = collapse(without(_anonymous(), before))


def whole_pages(ranges: Iterable[Range]) -> Iterator[Range]:
    """The whole huge pages in some ranges, those closer together than GAP taken as one."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin - joined[-1][1] <= GAP:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    for begin, end in joined:
        begin, end = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if begin < end:
            yield begin, end


def _madvise(address: int, length: int, advice: int) -> bool:
    libc = ctypes.CDLL(None)
    return libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice) == 0


def _anonymous() -> list[Range]:
    """Private writable memory without a file behind it, ascending."""
    found = []
    # As bytes: the name of a mapped file may be no UTF-8, and holds any line end but this one.
    for line in _MAPS.read_bytes().rstrip(b"\n").split(b"\n"):
        where, access, _, _, inode, *name = line.split(maxsplit=5)
        if access.startswith(b"rw-p") and inode == b"0" and (not name or name[0] == b"[heap]"):
            begin, end = (int(address, 16) for address in where.split(b"-"))
            found.append((begin, end))
    return found


def without(ranges: list[Range], taken: list[Range]) -> Iterator[Range]:
    """What of the ranges lies outside those taken; both ascending."""
    for begin, end in ranges:
        for other_begin, other_end in taken:
            if other_begin >= end:
                break
            if other_end > begin:
                if other_begin > begin:
                    yield begin, other_begin
                begin = max(begin, other_end)
        if begin < end:
            yield begin, end
