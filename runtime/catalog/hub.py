"""Files from the hub, through huggingface_hub: bundles as they are, checkpoints to be exported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import MANIFEST, Manifest
from kvq.runtime.errors import BundleError, HubError
from kvq.runtime.extras import install, missing
from kvq.runtime.machine.pipes import outlasting_connections

# Of a checkpoint: what the exporter reads, and nothing that could hold a pickle.
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


class UnavailableError(HubError):
    """A source that cannot be reached: the next one may do."""


def offline_wanted() -> bool:
    """HF_HUB_OFFLINE, read as huggingface_hub does."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def snapshot(reference: str, offline: bool, patterns: list[str]) -> Path:
    """Folder of the repository's files that match, from huggingface_hub's own cache or the hub.

    Raises:
        UnavailableError: not there, and not to be had.
    """
    if missing("huggingface_hub"):
        raise UnavailableError(f"fetching {reference} from the hub needs huggingface_hub: {install('hub')}")
    import huggingface_hub

    try:
        with outlasting_connections():
            return Path(huggingface_hub.snapshot_download(reference, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # its errors share no base class, and requests' come through
        if offline:
            raise UnavailableError(f"{reference} is not in the hub's cache on this machine") from None
        lines = str(error).strip().splitlines()
        raise UnavailableError(
            f"{reference} cannot be fetched from the hub ({type(error).__name__}: {lines[0][:150] if lines else ''})"
        ) from None


def manifest_of(reference: str, offline: bool) -> Path | None:
    """The manifest of a repository that is a kvq bundle; None for any other."""
    manifest = snapshot(reference, offline, [MANIFEST]) / MANIFEST
    return manifest if manifest.is_file() else None


def fetch_bundle(reference: str, offline: bool, manifest: Path, folder: Path) -> None:
    """Fetch the files a manifest lists into a new folder, and check them."""
    listed = _listed(manifest, reference)
    copy_bundle(snapshot(reference, offline, [MANIFEST, *listed]), folder, reference)


def copy_bundle(source: Path, folder: Path, reference: str) -> None:
    """Copy the listed files of a bundle, and check them: huggingface_hub keeps links, which a bundle may not hold."""
    listed = _listed(source / MANIFEST, reference)
    folder.mkdir()
    for name in (MANIFEST, *listed):
        if not (source / name).is_file():
            raise BundleError(f"{reference} lacks {name}, which its {MANIFEST} lists; it has to be uploaded again")
        shutil.copyfile(source / name, folder / name)
    Bundle(folder).check_graphs()


def _listed(manifest: Path, reference: str) -> list[str]:
    try:
        return list(Manifest.of_file(manifest).files)
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST} of {reference} is not UTF-8; it has to be exported again") from None
    except FileNotFoundError:
        raise HubError(f"{reference} holds no {MANIFEST}") from None
