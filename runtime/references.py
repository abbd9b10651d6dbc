"""What --model and `kvq.load` take: an embedded name, a bundle folder, or a hub id, fetched once and kept."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvq.runtime.bundle import MANIFEST, Bundle, Manifest
from kvq.runtime.errors import BundleError, CheckpointError, HubError

DEFAULT_MODEL = "kvq-books"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Of a checkpoint: what the exporter reads, and nothing that could hold a pickle.
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def embedded_models() -> dict[str, Path]:
    """Models that come with the package: name -> folder."""
    root = Path(str(importlib.resources.files("kvq.models"))) / "bundles"
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}


def home() -> Path:
    """Folder of what is kept between runs: KVQ_HOME, else kvq in XDG_CACHE_HOME, else ~/.cache/kvq."""
    if chosen := os.environ.get("KVQ_HOME"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq"


def cached_models() -> dict[str, Path]:
    """Models fetched from the hub and kept: hub id -> folder."""
    root = home() / "models"
    found = sorted(root.glob("*/*")) if root.is_dir() else []
    return {
        f"{path.parent.name}/{path.name}": path for path in found if HUB_ID.fullmatch(f"{path.parent.name}/{path.name}")
    }


def locate(reference: str, *, offline: bool | None = None, notice: Callable[[str], None] | None = None) -> Path:
    """Folder of the bundle that a reference names, fetched and made if need be.

    Args:
        reference: embedded name, bundle folder, or hub id ("owner/name") of a bundle or a checkpoint.
        offline: use only what is on this machine; None reads HF_HUB_OFFLINE.
        notice: told what takes time.

    Raises:
        BundleError: no such model.
        HubError: the hub is needed and cannot be had.
        CheckpointError: the checkpoint behind a hub id cannot be exported.
    """
    embedded = embedded_models()
    if reference in embedded:  # never a folder of that name in the current directory: say ./name for one
        return embedded[reference]
    if os.path.isdir(reference):
        return Path(reference)
    if HUB_ID.fullmatch(reference):
        cached = cached_models().get(reference)
        return cached or _fetch(reference, _offline() if offline is None else offline, notice or (lambda text: None))
    names = f"{', '.join(embedded)} is embedded" if embedded else "this installation has no embedded model"
    raise BundleError(
        f"no model {reference!r}: not a bundle folder or hub id (owner/name), and {names};"
        " make a bundle with kvq export CHECKPOINT FOLDER"
    )


def _offline() -> bool:
    """HF_HUB_OFFLINE, read as huggingface_hub does."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _fetch(reference: str, offline: bool, notice: Callable[[str], None]) -> Path:
    """Fetch a bundle, or a checkpoint and export it, into the cache; its folder there."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(
            f"{reference} is no bundle folder and not in the cache {home()}; fetching it needs huggingface_hub:"
            " pip install 'kvq[hub]', in a checkout '.[hub]'"
        )
    target = home() / "models" / reference
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: a bundle takes its name in one step, complete and checked.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            found = Path(folder) / "bundle"
            manifest = _snapshot(reference, offline, [MANIFEST]) / MANIFEST
            if manifest.is_file():
                _fetch_bundle(reference, offline, manifest, found)
            else:
                _export(reference, offline, found, notice)
            if not target.exists():  # another process may have been faster
                found.rename(target)
    except OSError as error:
        raise HubError(
            f"{reference} cannot be kept in {home()} ({error.strerror or error}); set KVQ_HOME to another folder"
        ) from None
    return target


def _snapshot(reference: str, offline: bool, patterns: list[str]) -> Path:
    """Folder of the repository's files that match, from huggingface_hub's own cache or the hub."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(reference, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # its errors share no base class, and requests' come through
        if offline:
            raise HubError(
                f"{reference} is not on this machine, and the hub is not to be used (--offline or HF_HUB_OFFLINE);"
                " fetch it once without, or give a bundle folder"
            ) from None
        lines = str(error).strip().splitlines()
        raise HubError(
            f"{reference} is no bundle folder and cannot be fetched from the hub"
            f" ({type(error).__name__}: {lines[0][:150] if lines else ''}); check the name and the connection"
        ) from None


def _fetch_bundle(reference: str, offline: bool, manifest: Path, folder: Path) -> None:
    """Copy the files a manifest lists: huggingface_hub keeps links, which a bundle may not hold."""
    try:
        listed = list(Manifest.from_json(manifest.read_text(encoding="utf-8")).files)
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST} of {reference} is not UTF-8; it has to be exported again") from None
    snapshot = _snapshot(reference, offline, [MANIFEST, *listed])
    folder.mkdir()
    for name in (MANIFEST, *listed):
        if not (snapshot / name).is_file():
            raise BundleError(f"{reference} lacks {name}, which its {MANIFEST} lists; it has to be uploaded again")
        shutil.copyfile(snapshot / name, folder / name)
    Bundle(folder)


def _export(reference: str, offline: bool, folder: Path, notice: Callable[[str], None]) -> None:
    """Export a checkpoint in a process of its own: torch stays out of this one, and its memory goes with it."""
    missing = [name for name in ("torch", "transformers", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise HubError(
            f"{reference} is a checkpoint, and turning it into a bundle needs {missing[0]}:"
            " pip install 'kvq[export]', in a checkout '.[export]'"
        )
    snapshot = _snapshot(reference, offline, CHECKPOINT_FILES)
    notice(f"exporting {reference} with 4-bit weights, once; kvq export has other choices")
    command = [sys.executable, "-m", "kvq", "export", str(snapshot), str(folder), "--name", reference]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVQ_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CheckpointError(lines[-1].removeprefix("kvq: ") if lines else f"exporting {reference} failed")


def described(path: Path) -> dict[str, Any]:
    """What `kvq list` tells of a bundle, from its manifest alone: JSON values; {"error"} for a damaged one."""
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, BundleError) as error:
        return {"path": str(path), "error": str(error)}
    return {
        "path": str(path),
        "nbytes": sum(entry["nbytes"] for entry in manifest.files.values()),
        "weights": manifest.weights.get("layers"),
        "context": manifest.architecture.context,
        "layers": manifest.architecture.layers,
        "hidden": manifest.architecture.hidden,
        "controllers": sorted(manifest.controllers),
        "chat_template": "chat_template.jinja" in manifest.files,
    }
