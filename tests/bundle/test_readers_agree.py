"""What the guard accepts means the same to onnx's own protobuf, and onnxruntime runs it without harm."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from kvq.exporter.export import export
from kvq.runtime.bundle import forms
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.onnx_file import Graph
from kvq.runtime.errors import BundleError
from tests.tools.mutants import MUTATIONS
from tests.tools.onnx_reader import read_by_onnx
from tests.tools.onnx_runs import outcomes

GRAPHS = ("segment_000.onnx", "segment_001.onnx", "segment_003.onnx", "decoder.onnx", "head.onnx", "uncertainty.onnx")
# Mutants of each kind and graph; more for a long run, see docs/security.md.
MUTANTS = int(os.environ.get("KVQ_MUTANTS", "150"))


@pytest.fixture(scope="module", params=["fp32", "int4"])
def checked(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle; the quantized one with all that an export can put into a graph."""
    folder = tmp_path_factory.mktemp("bundle") / request.param
    activations = "int16-head" if request.param == "int4" else "int8"
    options = {"weights": request.param, "activations": activations, "block": 32, "compensate": False}
    return Bundle(export(str(tiny_checkpoint), folder, **options).path)


def form_of(bundle: Bundle, name: str) -> forms.Form:
    shape = bundle.manifest.architecture
    if name.startswith("segment"):
        return forms.segment(shape, int(name[8:11]))
    return {"decoder.onnx": forms.decoder, "head.onnx": forms.head, "uncertainty.onnx": forms.uncertainty}[name](shape)


def accepted(data: bytes, name: str, form: forms.Form) -> Graph | None:
    try:
        return check_graph(data, name, {"weights.bin"}, form)
    except BundleError:
        return None


@pytest.mark.parametrize("name", GRAPHS)
def test_what_an_export_writes_is_read_alike(name: str, checked: Bundle) -> None:
    data = (checked.path / name).read_bytes()
    assert accepted(data, name, form_of(checked, name)) == read_by_onnx(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("name", GRAPHS)
def test_accepted_mutants_are_read_alike_and_run(name: str, kind: str, checked: Bundle, tmp_path: Path) -> None:
    data, form = (checked.path / name).read_bytes(), form_of(checked, name)
    rng, files = np.random.default_rng(zlib.crc32(f"{name} {kind}".encode())), []
    for i in range(MUTANTS):
        mutant = MUTATIONS[kind](data, rng)
        if (graph := accepted(mutant, name, form)) is not None and mutant != data:
            assert graph == read_by_onnx(mutant)
            files.append(tmp_path / f"{i}.onnx")
            files[-1].write_bytes(mutant)
    library = None
    if name == "decoder.onnx":
        library = pytest.importorskip("kvq.runtime.native.library").FILE
    told: dict[str, str] = {}
    for at in range(0, len(files), 100):
        told |= outcomes(files[at : at + 100], checked.path, library)
    print(f"{name}, {kind}: {MUTANTS} mutants, {len(files)} accepted, read alike and run")
    assert set(told.values()) <= {"ran"}, told


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_bytes_in_any_place_are_read_alike_or_refused(checked: Bundle, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(GRAPHS))
    content = (checked.path / name).read_bytes()
    at = data.draw(st.integers(0, len(content)))
    new = data.draw(st.binary(max_size=24))
    mutant = content[:at] + new + content[at + data.draw(st.integers(0, 24)) :]
    if (graph := accepted(mutant, name, form_of(checked, name))) is not None:
        assert graph == read_by_onnx(mutant)
