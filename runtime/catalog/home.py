"""The folder of what is kept between runs: where it is, and how a model gets into it whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvq.runtime.errors import HubError
from kvq.runtime.files import lock, try_lock

try:
    import fcntl
except ImportError:  # Windows: two processes that fetch the same model do the work twice there
    fcntl = None  # type: ignore[assignment]

# Hidden, so never taken for a model; mkdtemp puts eight characters behind the prefix.
PARTIAL = re.compile(r"\.(.+)\.partial-[a-z0-9_]{8}", re.DOTALL)
REPLACED = "replaced"  # what had the name before
LOCK = re.compile(r"\.(.+)\.lock", re.DOTALL)


def home() -> Path:
    """Folder of what is kept between runs: KVQ_HOME, else kvq in XDG_CACHE_HOME, else ~/.cache/kvq."""
    if chosen := os.environ.get("KVQ_HOME"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq"


def models() -> Path:
    """Folder of fetched models: NAME of the registry, or owner/name of the hub."""
    return home() / "models"


def exports() -> Path:
    """Folder of bundles made from checkpoints on this machine, named by the digest of their content."""
    return home() / "exports"


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Names the home in an error of writing to it."""
    try:
        yield
    except OSError as error:
        raise HubError(
            f"{what} cannot be kept in {home()} ({error.strerror or error}); free some space, or set KVQ_HOME to"
            " another folder"
        ) from None


@contextmanager
def claimed(target: Path, notice: Callable[[str], None] | None = None) -> Iterator[None]:
    """The only process that makes or removes `target`: another one waits here, and finds it done.

    The lock is a file ``.NAME.lock`` beside it; the operating system lets go of it when a process dies.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    held = try_lock(_lock_file(target))
    if held is None:
        if notice:
            notice(f"another process is at work on {target.name}; waiting for it")
        held = lock(_lock_file(target))
    try:
        yield
    finally:
        _unlock(target, held)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which the caller has claimed; gone when the block ends.

    Leftovers of killed processes, of this target and others, are removed first.
    """
    sweep(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(found: Path, target: Path, folder: Path) -> None:
    """Give the finished bundle `found` its name; what had it before goes into the temporary `folder`."""
    if os.path.lexists(target):
        target.rename(folder / REPLACED)
    found.rename(target)


def discard(target: Path) -> None:
    """Remove a folder of the home: out of sight in one step, then file by file. A link is removed, never followed."""
    # The two folders may be links, to a larger disk; what is in them may not lead out of them.
    roots = {models().resolve(), exports().resolve()}
    parent = target.parent.resolve()
    if not roots & {parent, parent.parent}:
        raise HubError(f"{target} is not inside {home()}, and nothing outside of it is removed")
    with kept(f"the removal of {target.name}"), claimed(target):
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            with staged(target) as folder:
                target.rename(folder / "removed")
    if target.parent.parent == models():
        with contextlib.suppress(OSError):  # there are other models of that owner
            target.parent.rmdir()


def sweep(own: Path) -> None:
    """Remove temporary folders and locks that no living process holds; this one has claimed `own`.

    A model that was being replaced when its process was killed gets its name back.
    """
    if fcntl is None:
        return
    owners = [path for path in models().glob("*") if not path.is_symlink()]
    for root in (models(), exports(), *owners):
        for path in list(root.iterdir()) if root.is_dir() else []:
            match = PARTIAL.fullmatch(path.name) or LOCK.fullmatch(path.name)
            if match is None or path.is_symlink() or path == own.parent / f".{own.name}.lock":
                continue
            target = root / match[1]
            with contextlib.suppress(OSError):
                held = None if target == own else try_lock(_lock_file(target))
                if path.is_dir() and (target == own or held is not None):
                    if (path / REPLACED).is_dir() and not os.path.lexists(target):  # killed between two renames
                        (path / REPLACED).rename(target)
                    shutil.rmtree(path, ignore_errors=True)
                if held is not None:
                    _unlock(target, held)


def _lock_file(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _unlock(target: Path, held: io.FileIO) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):
            _lock_file(target).unlink()
    held.close()
