"""A model bundle on disk: the manifest, and the checks before anything in it is used.

A bundle is a folder with ``kvq.json``, ONNX graphs, one file of weights they share, and a
tokenizer. Loading trusts nothing: names, kinds of file, sizes and digests come first, then the graphs.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kvq.runtime.bundle import forms, limits
from kvq.runtime.bundle.fields import encodable
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.manifest import KEY_FEEDBACK, KEY_TURNS, MANIFEST, WEIGHTS, Manifest, text_of
from kvq.runtime.bundle.onnx_file import GraphReader
from kvq.runtime.bundle.regions import Regions
from kvq.runtime.errors import BundleError, KvqError, MemoryShortageError
from kvq.runtime.precision.codecs.codebook import feeds_back_little
from kvq.runtime.precision.key_turns import KeyTurns, most_bytes, parsed


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
        try:
            if not self.path.is_dir():
                raise BundleError(f"no bundle at {path}: not a folder; make one with kvq export CHECKPOINT {path}")
            if not encodable(str(self.path)):  # onnxruntime is told the folder, as UTF-8
                raise BundleError(f"the name of the folder {path} is not UTF-8; give it another one")
            text = self._manifest_text()
            self.manifest = Manifest.from_json(text)
            self.digest = hashlib.sha256(text.encode()).hexdigest()
            for name, entry in self.manifest.files.items():
                self._check_file(name, entry)
        except (OSError, MemoryError) as error:
            raise unreadable(error, self.path) from None

    def _manifest_text(self) -> str:
        file = self.path / MANIFEST
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{self.path} holds no {MANIFEST}; point --model at a folder made by kvq export")
        try:
            return text_of(file)
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

    def check_graphs(self) -> None:
        """Look into the graphs now, as the first `graph` would.

        Raises:
            BundleError, MemoryShortageError: as for `graph`.
        """
        self.graph(self.manifest.head)

    def graph(self, name: str) -> bytes:
        """Bytes of an ONNX graph of the model, whose graphs have been understood, all of them.

        Raises:
            BundleError: one of them is not what our exporter writes, or a file has changed or gone since.
            MemoryShortageError: there is no memory to read them.
        """
        return self._graphs[name]

    def controller_graph(self, name: str, classes: int) -> bytes:
        """Bytes of the graph of a controller of so many classes, which holds all its data itself.

        Raises:
            BundleError, MemoryShortageError: as for `graph`.
        """
        data = self._read(name, limits.CONTROLLER_BYTES)
        check_graph(data, name, set(), forms.controller(self.manifest.architecture, classes))
        return data

    @cached_property
    def key_feedback(self) -> np.ndarray | None:
        """What codecs of keys do with errors, see `kvq.runtime.precision.codecs.Codec.encode`; None in older bundles.

        float16 [layers, kv_heads, head_dim, head_dim], read-only.

        Raises:
            BundleError: it is not of this model's shape, or not finite.
            MemoryShortageError: as for `graph`.
        """
        if KEY_FEEDBACK not in self.manifest.files:
            return None
        shape = self.manifest.architecture
        axes = (shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
        try:
            data = self._read(KEY_FEEDBACK, nbytes := 2 * math.prod(axes))
            if len(data) != nbytes:
                raise BundleError(f"{KEY_FEEDBACK} has not {nbytes} bytes; export the bundle again")
            feedback = np.frombuffer(data, "<f2").reshape(axes)
            if not np.isfinite(feedback).all() or not feeds_back_little(feedback):
                raise BundleError(f"{KEY_FEEDBACK} lets errors grow without bound; export the bundle again")
        except MemoryError as error:
            raise unreadable(error, self.path / KEY_FEEDBACK) from None
        return feedback

    @cached_property
    def key_turns(self) -> KeyTurns | None:
        """What keys of few bits are stored less, by position; None in older bundles and where nothing turns.

        Raises:
            BundleError: it is not of this model's shape, not finite, or too large.
            MemoryShortageError: as for `graph`.
        """
        if KEY_TURNS not in self.manifest.files:
            return None
        shape = self.manifest.architecture
        axes = (shape.layers, shape.kv_heads, shape.head_dim)
        try:
            return parsed(self._read(KEY_TURNS, most_bytes(*axes)), *axes)
        except ValueError as error:
            raise BundleError(f"{KEY_TURNS} {error}; export the bundle again") from None
        except MemoryError as error:
            raise unreadable(error, self.path / KEY_TURNS) from None

    @cached_property
    def _graphs(self) -> dict[str, bytes]:
        """Name -> bytes of the graphs of the model. They are kept: what was checked is what runs."""
        manifest, shape = self.manifest, self.manifest.architecture
        kinds = {name: forms.segment(shape, i) for i, name in enumerate(manifest.segments)}
        kinds[manifest.decoder] = forms.decoder(shape)
        kinds[manifest.head] = forms.head(shape)
        kinds[manifest.uncertainty] = forms.uncertainty(shape)
        found, reader = {}, GraphReader()
        try:
            regions = Regions((self.path / WEIGHTS).stat().st_size)
            for name, form in kinds.items():
                found[name] = self._read(name, limits.GRAPH_BYTES + limits.LAYER_BYTES * form.layers)
                regions.add(name, check_graph(found[name], name, {WEIGHTS}, form, reader).constants)
            regions.check_content(self.path / WEIGHTS, shape)
        except (OSError, MemoryError) as error:
            raise unreadable(error, self.path) from None
        return found

    def _read(self, name: str, most: int) -> bytes:
        """The content of a file of up to so many bytes, which is still what the manifest says."""
        try:
            with open(self.path / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > most:
                    raise BundleError(f"{name} is larger than {most} bytes; export the bundle again")
                data = file.read(size)
        except (OSError, MemoryError) as error:
            raise unreadable(error, self.path / name) from None
        self._check_content(name, data)
        return data

    def _check_content(self, name: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name]["sha256"]:
            raise BundleError(f"{name} has changed since the bundle was opened; copy or export the bundle again")


def unreadable(error: BaseException, path: Path) -> KvqError:
    """What to say of a file that the operating system, or Python, does not let us read."""
    if isinstance(error, KvqError):
        return error
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return MemoryShortageError(f"not enough memory to read {path}; free some, or take a smaller model")
    named, why = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
    if isinstance(error, FileNotFoundError):
        return BundleError(f"{named} is gone; copy or export the bundle again")
    return BundleError(f"{named} cannot be read ({why}); check its permissions, or export the bundle again")
