"""The standard one-file ONNX export through optimum, for other ONNX clients and as a reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.folder import replaced_folder
from kvq.runtime.errors import CheckpointError


def export_single(reference: str, out: str | Path) -> Path:
    """Write ``model.onnx`` (float32, inputs and outputs of text-generation-with-past) into the folder `out`.

    optimum runs in a process of its own: it opens onnxruntime sessions that a process which runs
    kvq models does not allow, and it prints a lot.

    Args:
        reference: a Hugging Face folder or a hub id.
        out: a folder that does not exist yet.

    Raises:
        CheckpointError: the checkpoint cannot be read or optimum cannot export it.
    """
    with replaced_folder(Path(out), overwrite=False) as folder:
        checkpoint = load_checkpoint(reference)  # the same refusals as for bundles, before the long work
        if not checkpoint.source.path.is_dir():
            raise CheckpointError(f"{reference} is no Hugging Face checkpoint, which optimum needs; give a folder")
        # -P: no module of the folder that the user stands in.
        command = [sys.executable, "-P", "-m", "optimum.exporters.onnx", "--model", str(checkpoint.source.path)]
        command += ["--task", "text-generation-with-past", "--no-post-process", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not (folder / "model.onnx").is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise CheckpointError(f"optimum could not export {checkpoint.name} ({last[:200]}); try kvq's own layout")
    return Path(out)
