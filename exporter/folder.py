"""A folder that is written whole or not at all, and what killed processes leave of theirs."""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvq.runtime.bundle.manifest import MANIFEST, Manifest
from kvq.runtime.errors import BundleError, CheckpointError
from kvq.runtime.files import sync_folder, write_atomically

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

# A name that nobody else gives, since what has it is removed; mkdtemp puts eight characters behind it.
WRITING, SUFFIX = ".writing-", re.compile(r"[a-z0-9_]{8}")
REPLACED = "replaced"


@contextmanager
def replaced_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the name `out` when the block ends well, and vanishes when not.

    An existing folder is replaced only with `overwrite`, and only if it is a bundle. Folders that killed processes have
    left of the same name are removed first.

    Raises:
        CheckpointError: `out` exists and must not be replaced, or cannot be written.
    """
    _remove_leftovers(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another name or pass --overwrite")
    if out.exists() and not _replaceable(out):
        raise CheckpointError(f"{out} exists and holds more than a bundle, so it is not replaced; choose another name")
    with _temporary(out) as folder:
        yield folder
        folder.chmod(_usual_mode(folder))
        sync_folder(folder)
        if out.exists():
            with _temporary(out) as aside:
                out.rename(aside / REPLACED)
                try:
                    folder.rename(out)
                except BaseException:
                    (aside / REPLACED).rename(out)
                    raise
        else:
            folder.rename(out)
        sync_folder(out.parent)


def _usual_mode(folder: Path) -> int:
    """Permissions that a folder made in it has: those that its user's umask gives."""
    probe = folder / ".mode"
    probe.mkdir()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.rmdir()


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which is gone when the block ends unless it has another name by then.

    As long as this process lives it holds a lock on the folder, by which others know not to remove it.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder, descriptor = _claimed(out)
    except OSError as error:
        raise CheckpointError(f"cannot write to {out.parent} ({error.strerror}); choose another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _claimed(out: Path) -> tuple[Path, int | None]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}{WRITING}", dir=out.parent))
        if fcntl is None:
            return folder, None
        # Somebody may have taken it for a leftover before it was locked.
        with suppress(FileNotFoundError):
            descriptor = _lock(folder, wait=True)
            if descriptor is None:  # a file system that has no locks on folders
                return folder, None
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _lock(folder: Path, wait: bool) -> int | None:
    """Descriptor of a folder that is locked by it; None where it is another's, or cannot be."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(out: Path) -> None:
    """Remove what killed processes have left beside `out`; one that was killed between two renames is finished."""
    if fcntl is None or not out.parent.is_dir():
        return
    prefix = f".{out.name}{WRITING}"
    with suppress(OSError):
        for path in sorted(out.parent.iterdir()):
            if not path.name.startswith(prefix) or not SUFFIX.fullmatch(path.name[len(prefix) :]):
                continue
            with suppress(OSError):
                descriptor = _lock(path, wait=False)
                if descriptor is None:
                    continue
                if (path / REPLACED).is_dir() and not out.exists():
                    (path / REPLACED).rename(out)
                for belongs in out.parent.glob(f"{glob.escape(path.name)}*"):  # itself, and drafts beside it
                    shutil.rmtree(belongs, ignore_errors=True)
                os.close(descriptor)


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or holds a bundle and no file besides."""
    if not folder.is_dir():
        return False
    found = {path.name for path in folder.iterdir()}
    try:
        listed = set(Manifest.of_file(folder / MANIFEST).files)
    except (OSError, ValueError, BundleError):
        return not found
    return found <= listed | {MANIFEST}


def write_text(folder: Path, name: str, text: str | None) -> None:
    """Write a UTF-8 file that survives a power cut; None writes nothing."""
    if text is not None:
        write_atomically(folder / name, text)
