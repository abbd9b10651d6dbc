"""Coverage-guided fuzzing of what reads a bundle: graphs beside onnx's own protobuf, and manifests.

    pip install atheris
    python -m tests.fuzz.bundles graphs -max_total_time=3600
    python -m tests.fuzz.bundles manifests -max_total_time=3600

Arguments behind the name are libFuzzer's. It starts from the embedded model's files, and ends with the input on
anything but a refusal or an agreement.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvq.runtime.bundle"]):
    from kvq.runtime.bundle import forms
    from kvq.runtime.bundle.guard import check_graph
    from kvq.runtime.bundle.manifest import MANIFEST, Manifest
    from kvq.runtime.errors import BundleError
from tests.tools.onnx_reader import read_by_onnx

ROOT = Path(__file__).resolve().parents[2] / "models" / "bundles" / "kvq-books"
NAMES = ("segment_000.onnx", "segment_001.onnx", "segment_006.onnx", "head.onnx", "uncertainty.onnx")


def graphs() -> tuple[Callable[[bytes], None], list[bytes]]:
    """What is accepted, in any form or in none, is read alike by onnx's protobuf."""
    shape = Manifest.of_file(ROOT / MANIFEST).architecture
    every = [None, forms.segment(shape, 0), forms.segment(shape, 1), forms.segment(shape, 6), forms.head(shape)]
    every += [forms.decoder(shape), forms.uncertainty(shape), forms.controller(shape, 6)]

    def try_one(data: bytes) -> None:
        for form in every:
            try:
                graph = check_graph(data, "graph", {"weights.bin"}, form)
            except BundleError:
                if form is None:  # no form accepts what is no graph at all
                    return
                continue
            assert graph == read_by_onnx(data)

    return try_one, [(ROOT / name).read_bytes() for name in NAMES]


def manifests() -> tuple[Callable[[bytes], None], list[bytes]]:
    """A text is a manifest or refused, in one line."""

    def try_one(data: bytes) -> None:
        try:
            manifest = Manifest.from_json(data.decode())
        except UnicodeDecodeError:
            return
        except BundleError as error:
            lines = str(error).splitlines()
        else:
            lines = [""] * (Manifest.from_json(manifest.to_json()) == manifest)
        assert len(lines) == 1

    return try_one, [(ROOT / MANIFEST).read_bytes()]


def main() -> None:
    """Fuzz what the first argument names."""
    name = sys.argv.pop(1)
    try_one, seeds = {"graphs": graphs, "manifests": manifests}[name]()
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds):
            (Path(corpus) / str(i)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus, f"-max_len={max(map(len, seeds)) + 1024}"], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
