"""Checkpoints and GGUF files on this machine: exported once, and kept by the digest of their content."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import MANIFEST, Manifest
from kvq.runtime.catalog.home import claimed, exports, kept, place, staged
from kvq.runtime.catalog.hub import CHECKPOINT_FILES
from kvq.runtime.errors import BundleError, CheckpointError, HubError
from kvq.runtime.extras import install, missing
from kvq.runtime.files import write_atomically

if TYPE_CHECKING:
    from kvq.runtime.catalog.process import Progress

Notice = Callable[[str], None]
# -P: a gguf.py or a folder kvq where the user stands, which may be full of downloads, is not ours to run.
EXPORT = [sys.executable, "-P", "-m", "kvq.runtime.cli.attended", "export"]


def is_checkpoint(path: Path) -> bool:
    """A .gguf file, or a Hugging Face folder that is no bundle."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / MANIFEST).exists()
    return path.suffix.lower() == ".gguf" and path.is_file()


def usable(folder: Path) -> bool:
    """A bundle of the version that this kvq reads; its files are checked when it is loaded."""
    try:
        Manifest.of_file(folder / MANIFEST)
    except (OSError, UnicodeDecodeError, BundleError):
        return False
    return True


def check_exporter(name: str, gguf: bool) -> None:
    """Raise HubError where the packages that an export needs are missing; before anything is downloaded."""
    if package := missing(*(["onnx", "gguf"] if gguf else ["onnx"])):
        raise HubError(f"{name} is a checkpoint, and turning it into a bundle needs {package}: {install('export')}")


def export(source: Path, folder: Path, name: str, notice: Notice | None, progress: Progress | None = None) -> None:
    """Export a checkpoint to a new folder, in a process of its own: its memory goes with it.

    Raises:
        HubError: a package that it needs is missing.
        CheckpointError: the exporter's own error.
    """
    check_exporter(name, source.suffix.lower() == ".gguf")
    if notice:
        notice(f"exporting {name}, once")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KVQ_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def look() -> None:
        if progress:
            progress(f"exporting {name}", _written(folder), None)

    command = [*EXPORT, str(source), str(folder), "--name", name]
    from kvq.runtime.catalog.process import finished

    code, said = finished(command, environment, look, errors_alone=True, attended=True)
    if code:
        lines = said.strip().splitlines()
        raise CheckpointError(lines[-1].removeprefix("kvq: ") if lines else f"exporting {name} failed")
    Bundle(folder)


def _written(folder: Path) -> int:
    """Bytes of the bundle so far; the exporter has it under a hidden name beside until it is whole."""
    most = 0
    for place_ in (folder, *folder.parent.glob(f".{folder.name}*")):
        try:
            most = max(most, sum(file.stat().st_size for file in place_.iterdir()))
        except OSError:  # not there, or renamed while we look
            continue
    return most


def exported(path: Path, notice: Notice | None = None, progress: Progress | None = None) -> Path:
    """Folder of the bundle of a checkpoint or GGUF file, made if it was not made before.

    Raises:
        HubError: the export packages are missing, or the bundle cannot be kept.
        CheckpointError: it cannot be exported.
    """
    target = exports() / content_digest(path)
    if not usable(target):
        with kept(str(path)), claimed(target, notice):
            if not usable(target):
                name = path.stem if path.is_file() else path.resolve().name
                with staged(target) as folder:
                    export(path, folder / "bundle", name, notice, progress)
                    place(folder / "bundle", target, folder)
    return target


def here(path: Path) -> Path | None:
    """Folder of the bundle made of this very content before, else None."""
    target = exports() / content_digest(path)
    return target if usable(target) else None


def content_digest(path: Path) -> str:
    """sha256 of a GGUF file, or over names and digests of a checkpoint's files.

    An index by path, sizes and times spares the reading when nothing has changed.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if _read(file))
        stamps = [[file.name, (at := file.stat()).st_size, at.st_mtime_ns] for file in files]
        key, index = str(path.resolve()), _index()
        known = index.get(key)
        if isinstance(known, dict) and known.get("stamps") == stamps and isinstance(known.get("sha256"), str):
            return known["sha256"]
        listed = json.dumps([(file.name, digest(file)) for file in files])
        found = digest(path) if path.is_file() else hashlib.sha256(listed.encode()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); check its permissions") from None
    with kept(str(path)):
        exports().mkdir(parents=True, exist_ok=True)
        write_atomically(exports() / "index.json", json.dumps({**index, key: {"stamps": stamps, "sha256": found}}))
    return found


def _read(file: Path) -> bool:
    """Of a checkpoint: what the exporter reads."""
    return file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in CHECKPOINT_FILES)


def _index() -> dict[str, dict]:
    """Path -> {"stamps", "sha256"}; what cannot be read is only computed again."""
    try:
        found = json.loads((exports() / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def local_exports() -> dict[str, Path]:
    """Bundles made from checkpoints here: path of the checkpoint, else that of the bundle -> folder."""
    root = exports()
    known = [(path, entry) for path, entry in _index().items() if isinstance(entry, dict) and os.path.exists(path)]
    sources = {entry.get("sha256"): path for path, entry in known}
    found = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []
    return {sources.get(path.name, str(path)): path for path in found}
