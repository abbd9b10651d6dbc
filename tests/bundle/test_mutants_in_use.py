"""Mutants of graphs that the guard lets through, in bundles that are loaded and used: what happens is told by name."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import kvq
from kvq.runtime.bundle import forms
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.errors import BundleError
from tests.tools.bundle_runs import outcomes
from tests.tools.mutants import MUTATIONS

MUTANTS = int(os.environ.get("KVQ_MUTANTS", "150"))
BACKEND = {"decoder.onnx": "native"}
KNOWN = {"ran", "BundleError", "NonFiniteError", "PolicyError"}


def let_through(
    data: bytes, name: str, form: forms.Form, external: set[str], folder: Path, kind: str, most: int = 1 << 20
) -> list[Path]:
    """Files of the mutants that the guard accepts, up to so many."""
    rng, files = np.random.default_rng(zlib.crc32(f"{name} {kind} in use".encode())), []
    for i in range(MUTANTS):
        mutant = MUTATIONS[kind](data, rng)
        try:
            check_graph(mutant, name, external, form)
        except BundleError:
            continue
        if mutant != data:
            files.append(folder / f"{i}.onnx")
            files[-1].write_bytes(mutant)
    print(f"{name}, {kind}: {MUTANTS} mutants, {len(files)} accepted, {min(len(files), most)} used")
    return files[:most]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("name", ["segment_001.onnx", "decoder.onnx", "head.onnx"])
def test_a_mutant_runs_or_is_refused(name: str, kind: str, bundle: Path, tmp_path: Path) -> None:
    shape = Bundle(bundle).manifest.architecture
    form = {"segment_001.onnx": forms.segment(shape, 1), "decoder.onnx": forms.decoder(shape)}.get(name)
    data = (bundle / name).read_bytes()
    files = let_through(data, name, form or forms.head(shape), {"weights.bin"}, tmp_path, kind)
    told = outcomes(files, bundle, name, BACKEND.get(name, "numpy"))
    assert set(told.values()) <= KNOWN, told


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize(("policy", "name"), [("adaptive", "controller.onnx"), ("paper", "controller-paper.onnx")])
def test_a_mutant_of_a_controller_chooses_or_is_refused(policy: str, name: str, kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kvq.load("kvq-books").path, tmp_path / "books"))
    manifest = Bundle(folder).manifest
    form = forms.controller(manifest.architecture, len(manifest.controllers[policy]["classes"]))
    files = let_through((folder / name).read_bytes(), name, form, set(), tmp_path, kind, most=30)
    told = outcomes(files, folder, name, "auto")
    assert set(told.values()) <= KNOWN, told
