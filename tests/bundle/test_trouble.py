"""What happens to a good bundle: too little memory, files that vanish, weights that are no numbers, failed runs."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

import kvq
from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle, unreadable
from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.compute.failures import refusal
from kvq.runtime.compute.head import Head
from kvq.runtime.errors import BundleError, MemoryShortageError, NonFiniteError, PolicyError
from tests.tools.bundles import edit, relist

# Loads a bundle and uses it (libraries like BLAS end a process that has no memory for their own first needs), then
# again in so many quarters of a megabyte more than the process has by then.
LOAD = """
import resource, sys
from kvq.composition import open_bundle
open_bundle(sys.argv[1]).session().append([1, 2, 3])
with open("/proc/self/statm") as file:
    most = int(file.read().split()[0]) * resource.getpagesize() + (int(sys.argv[2]) << 18)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    open_bundle(sys.argv[1]).session().append([1, 2, 3])
    print("ran")
except MemoryError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_out_of_memory_is_said_as_such(backend: str, bundle: Path) -> None:
    # The library of tokenizers ends the process where it gets no memory; ours do not.
    (bundle / "tokenizer.json").unlink()
    edit(bundle, lambda data: data["files"].pop("tokenizer.json"))
    told = []
    for quarters in (0, 1, 3, 6, 12, 25, 50, 400):
        environment = os.environ | {"KVQ_BACKEND": backend}
        command = [sys.executable, "-c", LOAD, str(bundle), str(quarters)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.strip())
    assert told[-1] == "ran"
    for line in told:
        assert line == "ran" or re.search("^MemoryShortageError .*not enough memory|Unable to allocate", line), line
        assert "export" not in line
    assert any("MemoryShortageError" in line for line in told), told


def test_onnxruntime_s_exceptions_become_ours_in_one_line() -> None:
    error = refusal(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : bad\nmore"), "head.onnx cannot be loaded", "try")
    assert isinstance(error, BundleError)
    assert str(error) == "head.onnx cannot be loaded ([ONNXRuntimeError] : 1 : FAIL : bad); try"
    assert isinstance(refusal(ValueError(""), "it failed", "try", PolicyError), PolicyError)
    assert str(refusal(ValueError(""), "it failed", "try")) == "it failed (ValueError); try"
    assert len(str(refusal(ValueError("\x1b[2J" + "x" * 5000), "it failed", "try"))) < 300
    ours = NonFiniteError("nan")
    assert refusal(ours, "it failed", "try") is ours


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("Exception during initialization: std::bad_alloc"),
        RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 8589934592"),
        RuntimeError("Mapping weights.bin: mmap failed, errcode = 12"),
    ],
)
def test_a_lack_of_memory_is_told_from_a_bad_bundle(error: Exception) -> None:
    told = refusal(error, "head.onnx cannot be loaded", "export the bundle again")
    assert isinstance(told, MemoryShortageError)
    assert isinstance(told, MemoryError)
    assert "export" not in str(told)


def test_files_that_the_system_does_not_give_us_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    assert "is gone" in str(unreadable(FileNotFoundError(2, "No such file", str(path)), path))
    assert "check its permissions" in str(unreadable(PermissionError(13, "Permission denied", str(path)), path))
    assert isinstance(unreadable(OSError(12, "Cannot allocate memory"), path), MemoryShortageError)


@pytest.mark.parametrize("name", [WEIGHTS, "segment_002.onnx", "decoder.onnx", "head.onnx", "uncertainty.onnx"])
def test_a_file_that_vanishes_after_the_bundle_was_opened_is_named(name: str, bundle: Path) -> None:
    opened = Bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is gone"):
        opened.graph("head.onnx")


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("graph", ["head", "uncertainty", "layers"])
def test_a_graph_that_fails_while_it_runs_is_named(
    graph: str, backend: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQ_BACKEND", backend)
    model = open_bundle(tiny_bundle)
    session = model.session("rule" if graph == "uncertainty" else "fp16")
    from kvq.runtime.compute import binding

    named = {"layers": "decoder" if backend == "native" else "segment_000"}.get(graph, graph)

    def fail(self: binding.Bound) -> None:
        if self._name == f"{named}.onnx":
            raise refusal(
                RuntimeError("Non-zero status code\nmore"), f"{self._name} does not fit the session", "export"
            )
        original(self)

    original = binding.Bound.run
    monkeypatch.setattr(binding.Bound, "run", fail)
    if graph == "uncertainty":
        with pytest.raises(BundleError, match=r"uncertainty\.onnx does not fit the session \(Non-zero status code\)"):
            Head(model.engine, 1).uncertainty(1)
        return
    with pytest.raises(BundleError, match=rf"{named}\.onnx does not fit the session \(Non-zero status code\)"):
        session.append([1, 2, 3])


def test_a_run_of_onnxruntime_that_raises_is_a_bundle_error(tiny_bundle: Path) -> None:
    head = Head(open_bundle(tiny_bundle).engine, 1)

    class Failing:
        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL\nmore")

    head.logits(np.zeros((1, 64), np.float32))
    head._heads[1]._session = Failing()  # type: ignore[assignment]
    with pytest.raises(BundleError, match=r"head\.onnx does not fit the session"):
        head.logits(np.zeros((1, 64), np.float32))


def filled(folder: Path, graph: str, ending: str, value: float) -> tuple[str, str]:
    """Write a number over all of a float constant of a graph; the file where the constant lies, and its name."""
    model = onnx.load(folder / graph, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith(ending))
    data = np.full(list(tensor.dims), value, np.float32).tobytes()
    if not tensor.external_data:
        tensor.raw_data = data
        (folder / graph).write_bytes(model.SerializeToString())
        relist(folder, graph)
        return graph, tensor.name
    with open(folder / WEIGHTS, "r+b") as weights:
        weights.seek(next(int(entry.value) for entry in tensor.external_data if entry.key == "offset"))
        weights.write(data)
    relist(folder, WEIGHTS)
    return WEIGHTS, tensor.name


CONSTANTS = {
    "a scale inside": ("decoder.onnx", "gate_proj+up_proj.scales"),
    "a scale of the head": ("head.onnx", ".scales"),
    "a gain": ("decoder.onnx", "layernorm.weight"),
    "a mean key": ("decoder.onnx", "mean_key"),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_weights_that_are_no_numbers_are_refused(constant: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Products with int8 activations take a NaN of the one before for nothing, and would go on with something else."""
    folder = export(str(tiny_checkpoint), tmp_path / "bundle", weights="int8").path
    for value in (np.nan, np.inf, -np.inf):
        file, name = filled(folder, *CONSTANTS[constant], value)
        with pytest.raises(BundleError) as caught:
            kvq.load(folder)
        assert str(caught.value).startswith(f"{file} is refused: '{name[:40]}")
        assert "holds NaN or infinity; export" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")  # numpy's, of what overflows: what comes of it is named
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_weights_whose_products_are_no_numbers_are_named(
    backend: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no danger, and found when the model is used: here by what stores keys and values."""
    monkeypatch.setenv("KVQ_BACKEND", backend)
    assert filled(bundle, "decoder.onnx", "v_proj", 3e38)[0] == WEIGHTS, "the segments have it from there, too"
    with pytest.raises(NonFiniteError, match=r"NaN|finite") as caught:
        kvq.load(bundle).session().append([1, 2, 3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("weight", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "layernorm.weight"])
def test_weights_of_any_size_say_something_or_are_named(weight: str, backend: str, bundle: Path) -> None:
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    ending = next((t.name for t in model.graph.initializer if weight in t.name and t.data_type == 1), "")
    for size in (1e-45, 1e6, 1e18, 1e30, 3.4e38):
        filled(bundle, "decoder.onnx", ending, size)
        for policy in ("fp16", "rule"):
            with warnings.catch_warnings(), contextlib.suppress(NonFiniteError):
                warnings.simplefilter("error")
                session = kvq.load(bundle).session(policy, backend=backend)
                session.append([1, 2, 3] * 20)
                assert np.isfinite(session.last_logits).all()
