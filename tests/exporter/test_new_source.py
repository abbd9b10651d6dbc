"""A format that kvq does not know, added as docs/adding.md says: one file, and one line that names its suffix."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kvq.exporter import sources
from kvq.exporter.export import export
from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.errors import CheckpointError
from tests.tools.examples import examples

NPZ = examples()["exporter/sources/npz.py"]


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file in place, for one test."""
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "npz.py").write_text(NPZ)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
    monkeypatch.setitem(sources.FILES, ".npz", ("npz", "NpzFile"))
    yield
    sys.modules.pop(f"{sources.__name__}.npz", None)


@pytest.fixture
def file(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in that format."""
    config = np.array((tiny_checkpoint / "config.json").read_text())
    np.savez(tmp_path / "tiny.npz", config=config, **load_file(tiny_checkpoint / "model.safetensors"))
    return tmp_path / "tiny.npz"


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_its_bundle_is_that_of_a_folder(weights: str, file: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    # The file has no tokenizer to read a text with, on which errors of weights are measured.
    options = {"weights": weights, "center": False, "compensate": False}
    ours = export(file, tmp_path / "ours", **options).manifest
    folder = export(tiny_checkpoint, tmp_path / "folder", **options).manifest
    for name in (WEIGHTS, *ours.segments, ours.decoder, ours.head):
        assert ours.files[name] == folder.files[name], name
    assert ours.architecture == folder.architecture
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert ours.eos_token_ids == folder.eos_token_ids == [config["eos_token_id"]]
    assert ours.source["name"] == "tiny"


def test_a_damaged_file_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for kept in (0, 10, len(data) // 2):
        file.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=r"tiny\.npz cannot be read"):
            export(file, tmp_path / "bundle")
