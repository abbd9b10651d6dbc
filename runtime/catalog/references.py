"""What --model and `kvq.load` take: a name, a folder, a GGUF file, or a hub id; found here, or fetched once."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq.runtime.bundle.manifest import MANIFEST, Manifest
from kvq.runtime.catalog import checkpoints
from kvq.runtime.catalog.choices import choices, chosen_default
from kvq.runtime.catalog.home import models
from kvq.runtime.catalog.hub import offline_wanted
from kvq.runtime.catalog.registry import HUB_ID, registry
from kvq.runtime.errors import BundleError
from kvq.runtime.files import is_path, shown

MOST_TOLD, MOST_COMPARED = 40, 1000  # names in a message, and that are looked through for one that comes close
DEFAULT_MODEL = "kvq-books"
SUGGESTED = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Found:
    """A reference that was understood.

    Attributes:
        name: the model's, in the form that is kept.
        origin: "named", "embedded", "registry", "folder", "checkpoint" or "hub".
        path: folder of the bundle; None where it has to be fetched or exported first.
    """

    name: str
    origin: str
    path: Path | None

    @property
    def way(self) -> str:
        """How to get one that has no path yet."""
        return (
            f"kvq name {self.name} NAME exports it"
            if self.origin == "checkpoint"
            else f"kvq pull {self.name} fetches it"
        )


def embedded_models() -> dict[str, Path]:
    """Models that come with the package: name -> folder."""
    root = Path(str(importlib.resources.files("kvq.models"))) / "bundles"
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}


def cached_models() -> dict[str, Path]:
    """Models fetched from the hub by their id and kept: hub id -> folder."""
    root = models()
    found = sorted(path for path in root.glob("*/*") if path.is_dir()) if root.is_dir() else []
    named = {f"{path.parent.name}/{path.name}": path for path in found if not (path.parent / MANIFEST).exists()}
    return {name: path for name, path in named.items() if HUB_ID.fullmatch(name)}


def pulled_models() -> dict[str, Path]:
    """Models of the registry that are here: name -> folder."""
    return {name: models() / name for name in registry() if (models() / name / MANIFEST).exists()}


def find(reference: str) -> Found:
    """What a reference means. Nothing is fetched or made.

    Raises:
        BundleError: nothing of that name, with what comes close.
    """
    chosen = choices()
    if reference in chosen.names:
        path = Path(chosen.names[reference])
        if not os.path.isdir(path):
            raise BundleError(
                f"{reference} stands for {shown(str(path))}, which is gone; kvq rm {reference} forgets the name"
            )
        return Found(reference, "named", path)
    embedded, known = embedded_models(), registry()
    if reference in embedded:  # never a folder of that name in the current directory: say ./name for one
        return Found(reference, "embedded", embedded[reference])
    if reference.lower() in known:
        name = reference.lower()
        return Found(name, "registry", models() / name if checkpoints.usable(models() / name) else None)
    path = Path(reference)
    if not is_path(reference):
        raise BundleError(f"no model has such a name, of {len(reference)} characters; kvq list shows those there are")
    hub = models() / reference if HUB_ID.fullmatch(reference) and not reference.lower().endswith(".gguf") else None
    if hub is not None and checkpoints.usable(hub):  # what was fetched is meant, wherever the command is given
        return Found(reference, "hub", hub)
    if reference and checkpoints.is_checkpoint(path):
        return Found(str(path.absolute()), "checkpoint", checkpoints.here(path))
    if os.path.isdir(reference):
        return Found(str(path.absolute()), "folder", path)
    if hub is not None:
        return Found(reference, "hub", None)
    if reference.startswith((".", "/", "~")) or reference.lower().endswith(".gguf"):
        raise BundleError(
            f"no model {reference!r:.300}: there is no bundle, checkpoint or .gguf file of that path; check it, or make"
            " a bundle with kvq export CHECKPOINT FOLDER"
        )
    raise BundleError(_unknown(reference, chosen.damage))


def locate(reference: str, *, offline: bool | None = None, notice: Callable[[str], None] | None = None) -> Path:
    """Folder of the bundle that a reference names, fetched and made if need be.

    Args:
        reference: in this order: a name the user gave, an embedded model, a model of the registry, a hub id
            ("owner/name") that was fetched, a checkpoint folder or GGUF file, a bundle folder, or another hub id.
        offline: use only what is on this machine; None reads HF_HUB_OFFLINE.
        notice: told what takes time.

    Raises:
        BundleError: no such model.
        HubError: a source is needed and cannot be had.
        CheckpointError: the checkpoint cannot be exported.
    """
    found = find(reference)
    if found.origin in ("registry", "hub") and os.path.isdir(reference) and notice:
        notice(f"{reference} is the model of that name; say ./{reference} for the folder")
    if found.path is not None:
        return found.path
    if found.origin == "checkpoint":
        return checkpoints.exported(Path(found.name), notice)
    from kvq.runtime.catalog.pull import Job, pull  # only now: most models are here already, and it takes milliseconds

    return pull(Job(found.name, registry().get(found.name), _offline(offline), notice))


def _offline(offline: bool | None) -> bool:
    return offline_wanted() if offline is None else offline


def default_model() -> tuple[str, str]:
    """The reference that stands for no -m, and what to tell the user of it ("" for nothing).

    Raises:
        BundleError: the chosen one is no longer here.
    """
    chosen = chosen_default()
    if chosen is None:
        return DEFAULT_MODEL, _hint()
    try:
        gone = find(chosen).path is None
    except BundleError:
        gone = True
    if gone:
        fetch = (
            f"kvq pull {shown(chosen)} fetches it again, " if chosen in registry() or HUB_ID.fullmatch(chosen) else ""
        )
        raise BundleError(
            f"the default model {shown(chosen)} is no longer here; {fetch}kvq use NAME chooses another"
            f" (kvq use {DEFAULT_MODEL}: the embedded one)"
        )
    return chosen, ""


def _hint() -> str:
    """How to get a better model than the embedded one."""
    here = [*pulled_models(), *cached_models()]
    entry = registry().get(SUGGESTED) or next(iter(registry().values()), None)
    if here:
        way = f"kvq use {here[0]} takes a real one"
    elif entry is not None:
        way = f"kvq pull {entry.name} fetches a real one"
        way += f" ({entry.nbytes / 1e6:.0f} MB)" if entry.nbytes else ""
    else:
        way = "kvq list says what else there is"
    return f"using {DEFAULT_MODEL}, an offline model trained on novels; {way}"


def known_names() -> list[str]:
    """Every name that -m takes: the user's own, embedded ones, the registry's, and hub ids that are here."""
    return [*dict.fromkeys([*choices().names, *embedded_models(), *registry(), *cached_models()])]


def _unknown(reference: str, damage: str) -> str:
    names = known_names()
    lower = {name.lower(): name for name in names[:MOST_COMPARED]}
    import difflib

    close = [lower[name] for name in difflib.get_close_matches(reference.lower(), lower, n=3, cutoff=0.6)]
    told = f"did you mean {' or '.join(close)}?" if close else f"there are {_listed(names)};"
    told += f" ({damage})" if damage else ""
    return (
        f"no model {reference!r:.300}, and no bundle folder, checkpoint, .gguf file or hub id (owner/name) either;"
        f" {told} kvq list shows all, kvq export makes a bundle of a checkpoint"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
    return ", ".join(names[:MOST_TOLD]) + more


def described(path: Path) -> dict[str, Any]:
    """What `kvq list` tells of a bundle, from its manifest alone: JSON values; {"error"} for a damaged one."""
    try:
        manifest = Manifest.of_file(path / MANIFEST)
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
