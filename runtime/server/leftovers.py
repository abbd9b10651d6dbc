"""The folder of a server's files: its own while it lives, and removed by the next one if it was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from kvq.runtime.files import try_lock

PREFIX = "kvq-serve-"
LOCK = ".lock"  # held as long as the server lives


class OwnFolder:
    """A folder for one server's files, readable by its user alone.

    Args:
        parent: where it is made; None is the system's place for temporary files.

    Attributes:
        path: of the folder.
        removed: folders of killed servers that were found beside it.
    """

    def __init__(self, parent: Path | None) -> None:
        place = Path(tempfile.gettempdir() if parent is None else parent)
        self.removed = remove_leftovers(place)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        self._lock = try_lock(self.path / LOCK)

    def close(self) -> None:
        """Remove it with all that is in it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        shutil.rmtree(self.path, ignore_errors=True)


def remove_leftovers(place: Path) -> int:
    """Remove the folders of this user's servers that are no more, and say how many; others are left alone.

    A folder without a lock is one that another program made, or a server of before: nobody can tell whether it lives.
    """
    if os.name != "posix":  # without locks between processes
        return 0
    removed = 0
    with contextlib.suppress(OSError):
        for folder in sorted(place.glob(PREFIX + "*")):
            with contextlib.suppress(OSError):
                removed += _remove(folder)
    return removed


def _remove(folder: Path) -> bool:
    about, lock = folder.lstat(), folder / LOCK
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or not stat.S_ISREG(lock.lstat().st_mode):
        return False
    held = try_lock(lock)
    if held is None:  # its server lives
        return False
    with held:
        shutil.rmtree(folder)
    return True
