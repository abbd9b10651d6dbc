"""A bundle again with activations in float32: for checks and evaluations that must not see their rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from kvq.exporter.folder import write_text
from kvq.exporter.graphs.options import ACCURACY_LEVEL
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import MANIFEST


def exact_copy(bundle: Path, folder: Path) -> None:
    """Write a bundle into an empty folder, its quantized products as `--activations fp32` exports them.

    Weights and controllers stay as they are. Products with 8-bit weights are many times slower then.

    Args:
        bundle: the folder to copy.
        folder: exists and is empty.

    Raises:
        BundleError: `bundle` is none, or damaged.
    """
    source = Bundle(bundle)
    manifest = source.manifest
    graphs = {*manifest.segments, manifest.decoder, manifest.head}
    for name, entry in manifest.files.items():
        if name not in graphs:
            shutil.copy2(source.path / name, folder / name)  # no link: onnxruntime reads no file with several names
            continue
        model = onnx.load(source.path / name, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = ACCURACY_LEVEL["fp32"]
        (folder / name).write_bytes(model.SerializeToString())
        entry |= {"nbytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    manifest.weights["activations"] = "fp32"
    for controller in manifest.controllers.values():  # of the same weights still
        controller["model"] = manifest.model_digest
    write_text(folder, MANIFEST, manifest.to_json())
