"""What goes when the user removes a model: only what lies in the home, and the names and choices that meant it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from kvq.runtime.catalog import checkpoints
from kvq.runtime.catalog.choices import changed, choices
from kvq.runtime.catalog.home import discard, exports, models
from kvq.runtime.catalog.references import HUB_ID, embedded_models
from kvq.runtime.catalog.registry import registry
from kvq.runtime.errors import BundleError


@dataclass
class Removal:
    """
    Attributes:
        folder: of the home, to be removed; None for a name alone.
        names: of the user, to be forgotten.
        default: it is the default model.
        kept: a bundle outside the home that only loses its name; None if there is none.
    """

    folder: Path | None = None
    names: list[str] = field(default_factory=list)
    default: bool = False
    kept: Path | None = None

    def run(self) -> None:
        """Do it: choices first, so that nothing means a model which is half gone."""
        if self.names or self.default:
            with changed() as chosen:
                for name in self.names:
                    chosen.names.pop(name, None)
                if self.default:
                    chosen.default = None
        if self.folder is not None:
            discard(self.folder)


def removal(reference: str) -> Removal:
    """What removing a reference would do.

    Raises:
        BundleError: it is embedded, not in the home, or not here.
    """
    chosen = choices()
    found = Removal()
    if reference in chosen.names:
        path = Path(chosen.names[reference])
        found.names = [reference]
        others = [name for name, place in chosen.names.items() if place == str(path) and name != reference]
        if path.parent == exports().absolute() and not others:
            found.folder = path
        elif path.is_dir():
            found.kept = path
    else:
        found.folder = _folder(reference)
        found.names = [name for name, place in chosen.names.items() if Path(place) == found.folder.absolute()]
    meant = {*found.names} if found.folder is None else {reference, reference.lower(), *found.names}
    meant |= {str(found.folder.absolute())} if found.folder else set()
    found.default = chosen.default in meant
    return found


def _folder(reference: str) -> Path:
    """Folder in the home that a reference names, sound or damaged."""
    if reference in embedded_models():
        raise BundleError(f"{reference} is embedded: it comes with kvq and cannot be removed")
    name = reference.lower() if reference.lower() in registry() else reference
    if (name in registry() or HUB_ID.fullmatch(name)) and (models() / name).is_dir():
        return models() / name
    local = checkpoints.local_exports()
    for path in (reference, str(Path(reference).absolute()), os.path.realpath(reference)):
        if reference and path in local:
            return local[path]
    for folder in local.values():
        if reference and Path(reference).absolute() == folder.absolute():
            return folder
    if reference and Path(reference).exists():
        raise BundleError(f"{reference} is not in the cache, and nothing outside of it is removed")
    raise BundleError(f"no model {reference!r} in the cache; kvq list shows what there is")
