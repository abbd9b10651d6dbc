"""Files written atomically: whoever reads the name finds the old file or the new one, whole.

Devices, pipes and what a process has open (`/dev/stdout`) cannot be, and must not be replaced: they are written to.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: two processes that write the same file at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

PUBLIC, PRIVATE = 0o666, 0o600  # permissions of new files, before the umask
AT_ONCE = 1 << 20  # bytes of a file that may have no end
LONGEST, LONGEST_PART = 4095, 255  # bytes of a path, and of its parts, that systems take


def is_path(text: str) -> bool:
    """Whether a system could have a file of this path: what it takes no name for raises errors of many kinds."""
    try:
        sizes = [len(os.fsencode(part)) for part in Path(text).parts]
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can name
        return False
    return "\0" not in text and len(text) <= LONGEST and max(sizes, default=0) <= LONGEST_PART and sum(sizes) <= LONGEST


def shown(text: str) -> str:
    """A path as a message has it: what would move a terminal's cursor is written out."""
    return text if text.isprintable() else repr(text)


def read_regular(path: Path, most: int, follow: bool = False) -> bytes:
    """The last `most` bytes of a regular file, without waiting for a pipe's other end.

    Args:
        follow: a link, too.

    Raises:
        OSError: it is none, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        file.seek(max(0, found.st_size - most))
        return file.read(most)


def _written_through(path: Path) -> bool:
    """Whether a name is a device's, a pipe's or an open file's."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISREG(mode):  # `/dev/stdout`, or `/dev/fd/3`, can lead to one that a shell has opened
        return path.absolute().parts[:2] in (("/", "dev"), ("/", "proc")) and path.is_symlink()
    return not stat.S_ISDIR(mode)


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """All of a file, a pipe or a device, which may have no end.

    Raises:
        OSError: it cannot be read, or has more than `most` bytes.
    """
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_size > most:  # a file of holes would be read for a while first
            raise _too_large(most)
        return bounded(file, most)


def bounded(file: BinaryIO, most: int) -> bytes:
    """All that is left of an open file, as `read_bounded`."""
    pieces, left = [], most
    # In pieces, for which alone there is memory: of all that is asked for, a file sets it aside at once.
    while piece := file.read(min(AT_ONCE, left + 1)):
        left -= len(piece)
        if left < 0:
            raise _too_large(most)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {most >> 20} MB")


@contextmanager
def atomic_file(path: str | os.PathLike[str], private: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the name `path` when the block ends well and vanishes when not.

    private: a new one is its user's alone to read, from its first byte on.

    The temporary file, ``.NAME.tmp`` in the same folder, is synchronised before the rename and the folder after
    it. Its name is always the same, so a killed writer leaves at most one behind, which the next one takes over;
    writers of the same file wait for each other. An existing file keeps its permissions, and of a link it is the file
    it leads to that is replaced. What is no regular file is written to as the block goes.

    Raises:
        OSError: the folder cannot be written, or there is no space; `path` is as it was.
    """
    path = Path(path)
    if _written_through(path):
        with open(path, "ab") as file:
            yield file
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.tmp")
    # Closing gives the lock back, so the name is dealt with before that.
    with lock(temporary, PRIVATE if private else PUBLIC) as held, io.BufferedWriter(held) as file:
        try:
            file.truncate(0)
            if private:  # one that a killed writer left may be otherwise
                os.chmod(temporary, PRIVATE)
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
    sync_folder(path.parent)


def lock(path: Path, mode: int = PUBLIC) -> io.FileIO:
    """A file, made if need be, once no other process holds it, to read and write; closing it gives it back.

    The file may be renamed or removed while it is held. It closes when nobody refers to it any more: an interrupt
    (Ctrl-C) at any moment leaves nothing locked.

    Args:
        path: of the file.
        mode: permissions of a new one, before the umask.
    """
    while (file := _held(path, wait=True, mode=mode)) is None:
        pass
    return file


def try_lock(path: Path) -> io.FileIO | None:
    """As `lock`, but None where another process holds the file."""
    try:
        while (file := _held(path, wait=False)) is None:
            pass
    except BlockingIOError:
        return None
    return file


def _held(path: Path, wait: bool, mode: int = PUBLIC) -> io.FileIO | None:
    """The file; None where whoever held the file before us has renamed or removed the one that we opened."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    file = io.FileIO(os.open(path, flags, mode), "r+b")
    try:
        if fcntl is None:
            return file
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False)):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a whole file, text as UTF-8, see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """fsync a folder, so that its entries survive a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
