"""A model bundle on disk: the manifest, and the checks before anything in it is used.

A bundle is a folder with ``kvq.json``, ONNX graphs, one file of weights they share, and a
tokenizer. Loading trusts nothing: names, kinds of file, sizes and digests come first.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS, Manifest
from kvq.runtime.errors import BundleError

MANIFEST_MAX_BYTES = 1 << 20


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bundle:
    """A checked bundle: every listed file was there, unlinked, of the stated size and digest.

    Attributes:
        path: absolute folder.
        manifest: the parsed kvq.json.
        digest: sha256 of kvq.json; as that lists all digests, it identifies the model.
    """

    def __init__(self, path: str | Path) -> None:
        """Open and verify.

        Raises:
            BundleError: with the file and the remedy.
        """
        self.path = Path(path).absolute()
        if not self.path.is_dir():
            raise BundleError(f"no bundle at {path}: not a folder; make one with kvq export CHECKPOINT {path}")
        try:
            text = self._manifest_text()
            self.manifest = Manifest.from_json(text)
            self.digest = hashlib.sha256(text.encode()).hexdigest()
            for name, entry in self.manifest.files.items():
                self._check_file(name, entry)
        except OSError as error:
            raise BundleError(f"{error.filename} cannot be read ({error.strerror}); check its permissions") from None

    def _manifest_text(self) -> str:
        file = self.path / MANIFEST
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{self.path} holds no {MANIFEST}; point --model at a folder made by kvq export")
        if file.stat().st_size > MANIFEST_MAX_BYTES:
            raise BundleError(f"{MANIFEST} is larger than {MANIFEST_MAX_BYTES} bytes; export the bundle again")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BundleError(f"{MANIFEST} is not UTF-8; export the bundle again") from None

    def _check_file(self, name: str, entry: dict[str, Any]) -> None:
        file = self.path / name
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{name} is missing from {self.path} or not a regular file; export the bundle again")
        size = file.stat().st_size
        if size != entry["nbytes"]:
            raise BundleError(
                f"{name} has {size} bytes, the manifest says {entry['nbytes']}: the copy is incomplete or damaged;"
                " copy or export the bundle again"
            )
        if digest(file) != entry["sha256"]:
            raise BundleError(f"{name} has another sha256 than the manifest says; copy or export the bundle again")

    def graph(self, name: str) -> bytes:
        """Bytes of an ONNX graph that holds only our own operators and data from `WEIGHTS`."""
        return self._graph(name, {WEIGHTS})

    def controller_graph(self, name: str) -> bytes:
        """Bytes of a controller's graph, which holds all its data itself."""
        return self._graph(name, set())

    def _graph(self, name: str, external_files: set[str]) -> bytes:
        data = (self.path / name).read_bytes()
        check_graph(data, name, external_files)
        return data
