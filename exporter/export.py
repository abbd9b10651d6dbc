"""Checkpoint -> bundle, written atomically."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvq.exporter.calibration import calibration_ids, calibration_text, mean_keys
from kvq.exporter.checkpoint import Checkpoint, load_checkpoint
from kvq.exporter.graph import WeightFile
from kvq.exporter.rotation import head_rotation
from kvq.exporter.segments import ACCURACY_LEVEL, HEAD_BITS, LAYER_BITS, SegmentOptions, SegmentWriter
from kvq.runtime.bundle import CHAT_TEMPLATE, MANIFEST, TOKENIZER, WEIGHTS, Manifest, digest
from kvq.runtime.errors import BundleError, CheckpointError
from kvq.runtime.files import sync_folder, write_atomically

# progress(done, total, what)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Summary:
    """What an export made: the bundle's folder, its parts in bytes, and the time it took in seconds."""

    path: Path
    manifest: Manifest
    nbytes: int
    seconds: float
    notes: list[str]

    def lines(self) -> list[str]:
        """For people."""
        shape, files = self.manifest.architecture, self.manifest.files
        graphs = sum(entry["nbytes"] for name, entry in files.items() if name.endswith(".onnx"))
        kv_token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
        return [
            f"{self.path}: {self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s",
            f"  weights {files[WEIGHTS]['nbytes'] / 1e6:.1f} MB"
            f" (layers {self.manifest.weights['layers']}, embedding and head {self.manifest.weights['head']}),"
            f" {len(self.manifest.segments) + 3} graphs {graphs / 1e6:.1f} MB",
            f"  {shape.layers} layers, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim},"
            f" context {shape.context}; {kv_token / 1e3:.1f} kB of KV cache a token at 16 bits",
            *(f"  {note}" for note in self.notes),
        ]


def export(
    checkpoint: str | Checkpoint,
    out: str | Path,
    *,
    weights: str = "int4",
    activations: str = "int8",
    block: int = 64,
    rotate: bool = True,
    center: bool = True,
    calibration: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Export a checkpoint as a bundle.

    Args:
        checkpoint: a Hugging Face folder, a hub id, or a loaded checkpoint.
        out: the bundle's folder; must not exist unless `overwrite`.
        weights: "fp32", "int8" or "int4".
        activations: "int8", "int16-head" or "fp32", for products with quantized weights; see `SegmentOptions`.
        block: elements per scale, a power of two from 16 to 256.
        rotate: rotate heads by a Hadamard matrix where head_dim is a power of two.
        center: subtract each head's mean key, calibrated on a text.
        calibration: that text; None takes a built-in one.
        name: of the model, in the manifest; None is the checkpoint's.
        overwrite: replace an existing bundle.
        progress: called as work goes on.

    Raises:
        CheckpointError: unreadable checkpoint, an option of no known value, or `out` exists.
        UnsupportedArchitectureError: a variant that kvq does not implement.
    """
    for option, value, known in (
        ("weights", weights, LAYER_BITS),
        ("activations", activations, ACCURACY_LEVEL),
        ("block", block, (16, 32, 64, 128, 256)),
    ):
        if value not in known:
            raise CheckpointError(f"{option} is {value!r}; use one of {', '.join(map(str, known))}")
    begun = time.perf_counter()
    out = Path(out).absolute()
    progress = progress or (lambda done, total, what: None)
    with replaced_folder(out, overwrite) as folder:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(checkpoint)
        shape, notes = checkpoint.architecture, []
        rotation_name, rotation = head_rotation(shape.head_dim, rotate)
        if rotate and rotation_name == "none":
            notes.append(f"no rotation: head_dim {shape.head_dim} is not a power of two")
        tokenizer = checkpoint.tokenizer_json()
        if tokenizer is None:
            notes.append("no tokenizer in the checkpoint: the bundle takes token ids only")
            if calibration is not None:
                raise CheckpointError(
                    f"{checkpoint.name} has no tokenizer to read the calibration text with; leave it out"
                )
            if center:
                notes.append("keys not centred: there is no tokenizer to calibrate with")
        means = np.zeros((shape.layers, shape.kv_heads, shape.head_dim), np.float32)
        centered = center and tokenizer is not None
        if tokenizer is not None and centered:
            progress(0, shape.layers + 4, "calibrating keys")
            ids = calibration_ids(tokenizer, calibration_text() if calibration is None else calibration)
            if len(ids) < 2:
                raise CheckpointError("the calibration text has fewer than two tokens; give a few paragraphs")
            means = mean_keys(checkpoint, ids, rotation)

        file = WeightFile(folder)
        writer = SegmentWriter(checkpoint, SegmentOptions(weights, activations, block, rotation, means), folder, file)
        segments = []
        for segment in writer.segments():
            segments.append(segment)
            progress(len(segments), shape.layers + 4, "writing segments")
        decoder, head, uncertainty = writer.decoder(), writer.head(), writer.uncertainty()
        file.close()
        progress(shape.layers + 3, shape.layers + 4, "digests")
        write_text(folder, TOKENIZER, tokenizer)
        write_text(folder, CHAT_TEMPLATE, checkpoint.chat_template())
        manifest = Manifest(
            name=name or checkpoint.name,
            architecture=shape,
            weights={
                "layers": weights,
                "head": "int8" if HEAD_BITS[weights] else "fp32",
                "block": block,
                "activations": activations,
            },
            kv={"rotation": rotation_name, "centered": centered},
            decode_weight_nbytes=writer.decode_weight_nbytes,
            eos_token_ids=checkpoint.eos_token_ids(),
            segments=segments,
            decoder=decoder,
            head=head,
            uncertainty=uncertainty,
            special_tokens=checkpoint.special_tokens(),
            files={f.name: {"nbytes": f.stat().st_size, "sha256": digest(f)} for f in sorted(folder.iterdir())},
        )
        write_text(folder, MANIFEST, manifest.to_json())
        progress(shape.layers + 4, shape.layers + 4, "done")
    nbytes = sum(f.stat().st_size for f in out.iterdir())
    return Summary(out, manifest, nbytes, time.perf_counter() - begun, notes)


@contextmanager
def replaced_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the name `out` when the block ends well, and vanishes when not.

    An existing folder is replaced only with `overwrite`, and only if it is a bundle.

    Raises:
        CheckpointError: `out` exists and must not be replaced, or cannot be written.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another name or pass --overwrite")
    if out.exists() and not _replaceable(out):
        raise CheckpointError(f"{out} exists and holds more than a bundle, so it is not replaced; choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {out.parent} ({error.strerror}); choose another folder") from None
    try:
        yield folder
        folder.chmod(0o755)
        sync_folder(folder)
        if out.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(aside / out.name)
            try:
                folder.rename(out)
            except BaseException:
                (aside / out.name).rename(out)
                raise
            shutil.rmtree(aside)
        else:
            folder.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty or holds a bundle and no file besides."""
    if not folder.is_dir():
        return False
    found = {path.name for path in folder.iterdir()}
    try:
        listed = set(Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8")).files)
    except (OSError, ValueError, BundleError):
        return not found
    return found <= listed | {MANIFEST}


def write_text(folder: Path, name: str, text: str | None) -> None:
    """Write a UTF-8 file that survives a power cut; None writes nothing."""
    if text is not None:
        write_atomically(folder / name, text)
