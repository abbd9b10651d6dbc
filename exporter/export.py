"""Checkpoint -> bundle, written atomically."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvq.exporter.calibration import NewBundle, calibration_ids, calibration_text, mean_keys
from kvq.exporter.checkpoint import Checkpoint, load_checkpoint
from kvq.exporter.few_bits import FewBits
from kvq.exporter.folder import replaced_folder, write_text
from kvq.exporter.graphs.options import ACCURACY_LEVEL, GraphOptions
from kvq.exporter.graphs.writer import GraphWriter
from kvq.exporter.key_feedback import key_feedback
from kvq.exporter.key_statistics import key_statistics
from kvq.exporter.key_turns import frequencies_of, turned_keys
from kvq.exporter.profiles import profiles_for
from kvq.exporter.rotation import head_rotation
from kvq.exporter.sources.base import shown
from kvq.exporter.weights.file import WeightFile
from kvq.exporter.weights.matrices import LAYER_BITS, Knowledge, carried_over, on_grid
from kvq.models.shipped import attach, profiles_for_source
from kvq.runtime.bundle.bundle import digest
from kvq.runtime.bundle.manifest import CHAT_TEMPLATE, KEY_FEEDBACK, KEY_TURNS, MANIFEST, TOKENIZER, WEIGHTS, Manifest
from kvq.runtime.errors import CheckpointError

# What keys can be, and what a manifest says of them: of plain ones nothing, as ever.
KEYS: dict[str, dict[str, str]] = {"plain": {}, "balanced": {"keys": "balanced"}}
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
        shape, files, weights = self.manifest.architecture, self.manifest.files, self.manifest.weights
        graphs = sum(entry["nbytes"] for name, entry in files.items() if name.endswith(".onnx"))
        kv_token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
        return [
            f"{self.path}: {self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s",
            f"  weights {files[WEIGHTS]['nbytes'] / 1e6:.1f} MB"
            f" (layers {weights['layers']}, embedding and head {weights['head']},"
            f" {weights['exact']} of {weights['matrices']} matrices exactly as the source has them,"
            f" {weights['grid']} rotated on its grids),"
            f" {len(self.manifest.segments) + 3} graphs {graphs / 1e6:.1f} MB",
            f"  {shape.layers} layers, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim},"
            f" context {shape.context}; {kv_token / 1e3:.1f} kB of KV cache a token at 16 bits",
            *(f"  {note}" for note in self.notes),
            *(
                [f"  precisions by layer: {', '.join(classes)}"]
                if (classes := [str(c) for c, _ in shape.profiles])
                else []
            ),
            *(
                [f"  controllers: {', '.join(found)}, trained for this model"]
                if (found := self.manifest.controllers)
                else []
            ),
        ]


def export(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    weights: str | float = "auto",
    activations: str = "int8",
    block: int = 64,
    rotate: bool | str = True,
    center: bool = True,
    keys: str | None = None,
    compensate: bool | None = None,
    profiles: bool | None = None,
    calibration: str | None = None,
    context: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Export a checkpoint as a bundle.

    Args:
        checkpoint: a Hugging Face folder, a .gguf file, a hub id, or a loaded checkpoint.
        out: the bundle's folder; must not exist unless `overwrite`.
        weights: a name, see `kvq.exporter.weights.matrices.LAYER_BITS`, or a number from 4 to 8: bits on average,
            of matrices so that they do least damage, see `kvq.exporter.damage`.
        activations: "int8", "int16-head" or "fp32", for products with quantized weights; see `GraphOptions`.
        block: elements per scale, a power of two from 16 to 256.
        rotate: heads, and what products take, by Hadamard matrices where there are any; "heads": these alone.
        center: subtract each head's mean key, calibrated on a text.
        keys: "balanced", see `kvq.exporter.key_basis`, or "plain"; None is balanced where keys are centred.
        compensate: weights that are quantized here make up for their own errors on that text, see
            `kvq.exporter.weights.compensate`, which takes as long again. None: those of fewer than 8 bits do.
        profiles: where keys are centred, measure which precisions suit each layer. None: the package's, if it has any.
        calibration: that text; None takes a built-in one.
        context: of a checkpoint that is not loaded yet, see `load_checkpoint`.
        name: of the model, in the manifest; None is the checkpoint's.
        overwrite: replace an existing bundle.
        progress: called as work goes on.

    Raises:
        CheckpointError: unreadable checkpoint, an option of no known value, or `out` exists.
        UnsupportedArchitectureError: a variant that kvq does not implement.
    """
    few, progress = FewBits(weights, compensate), progress or _silent
    _check_options(weights=few.weights, activations=activations, block=block, keys=keys)
    begun, out = time.perf_counter(), Path(out).absolute()
    with replaced_folder(out, overwrite) as folder:
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint, context)
        tokenizer, notes = checkpoint.tokenizer_json(), list(checkpoint.model.notes)
        keys = keys or ("balanced" if center and tokenizer is not None else "plain")
        ids = _calibration(checkpoint.name, tokenizer, center, keys, calibration, notes)
        options, kv = _graph_options(checkpoint, few.weights, activations, block, rotate, notes)
        _write_texts(checkpoint, tokenizer, folder, name)
        text = _text_of_weights(ids, tokenizer, calibration)
        notes += few.notes(text)
        with few.knowledge(checkpoint, options, folder, text, progress) as known:
            written = _write_graphs(checkpoint, options, kv | KEYS[keys], name, folder, ids, _part(progress), known)
        manifest = _finished(written, folder, ids, profiles, progress)
    return Summary(out, manifest, sum(f.stat().st_size for f in out.iterdir()), time.perf_counter() - begun, notes)


def _write_texts(checkpoint: Checkpoint, tokenizer: str | None, folder: Path, name: str | None) -> None:
    """Write what is text; whatever no bundle could say is refused here, before the long work."""
    checkpoint.said(name)
    write_text(folder, TOKENIZER, tokenizer)
    write_text(folder, CHAT_TEMPLATE, checkpoint.chat_template())


def _total(layers: int) -> int:
    """What the progress of `_write_graphs` counts up to; measuring layers takes three tenths more."""
    return 10 * (layers + 4)


def _part(progress: Progress) -> Progress:
    """Progress of what comes before layers are measured."""
    return lambda done, total, what: progress(7 * done, 10 * total, what)


def _silent(done: int, total: int, what: str) -> None:
    """No progress is shown."""


def _check_options(**options: Any) -> None:
    """Raise CheckpointError for a value that an option does not have."""
    known = {"weights": LAYER_BITS, "activations": ACCURACY_LEVEL, "block": (16, 32, 64, 128, 256), "keys": KEYS}
    for option, value in options.items():
        if value not in known[option] and (option, value) != ("keys", None):
            raise CheckpointError(f"{option} is {value!r}; use one of {', '.join(map(str, known[option]))}")


def _graph_options(
    checkpoint: Checkpoint, weights: str, activations: str, block: int, rotate: bool | str, notes: list[str]
) -> tuple[GraphOptions, dict[str, Any]]:
    """How graphs are written before means of keys are known, and what a manifest says of keys and values then."""
    head_dim = checkpoint.architecture.head_dim
    rotation_name, rotation = head_rotation(head_dim, bool(rotate))
    if rotate and rotation_name == "none":
        notes.append(f"no rotation: head_dim {head_dim} is not a power of two")
    options = GraphOptions(
        weights,
        activations,
        block,
        rotation,
        _no_means(checkpoint),
        _rotation_of_values(checkpoint, weights, activations, block, turns=rotate is True),
        turns=rotate is True,
    )
    return options, {"rotation": rotation_name, "centered": False, "values": options.values}


def _no_means(checkpoint: Checkpoint) -> np.ndarray:
    """Means of keys that are not centred, or not yet, float32 [layers, kv_heads, head_dim]."""
    shape = checkpoint.architecture
    return np.zeros((shape.layers, shape.kv_heads, shape.head_dim), np.float32)


def _write_graphs(
    checkpoint: Checkpoint,
    options: GraphOptions,
    kv: dict[str, Any],
    name: str | None,
    folder: Path,
    ids: np.ndarray | None,
    progress: Progress,
    known: Knowledge,
) -> Manifest:
    """Write graphs and weights into a folder; the manifest of all that is in it then.

    Args:
        options: with means of zero.
        kv: of the manifest.
        name: of the model; None is the checkpoint's.
        ids: int64 [tokens] to measure mean keys on; None leaves keys as they are.
        known: see `GraphWriter`.
    """
    layers = checkpoint.architecture.layers
    total = _total(layers)
    with WeightFile(folder) as file:
        writer = GraphWriter(checkpoint, options, folder, file, known)
        segments = []
        for segment in writer.segments():
            segments.append(segment)
            progress(5 * len(segments), total, "writing segments")
        said = {"activations": options.activations, "compensated": bool(known.moments)}
        manifest = Manifest(
            name=shown(name or checkpoint.name),
            architecture=checkpoint.architecture,
            segments=segments,
            decoder=writer.decoder(),
            head=writer.head(),
            uncertainty=writer.uncertainty(),
            weights=writer.matrices.describe() | said,
            kv=kv,
            decode_weight_nbytes=writer.matrices.decode_weight_nbytes,
            source=checkpoint.source.describe(),
            **checkpoint.said(name),
        )
        file.flush()
        if ids is not None:
            write_text(folder, MANIFEST, replace(manifest, files=NewBundle.files(folder)).to_json())
            half = 5 * (layers + 1)

            def measured(done: int, count: int) -> None:
                progress(half + (total - half - 20) * done // count, total, "calibrating keys")

            _measure_keys(writer, folder, frequencies_of(checkpoint.model), options.rotation, ids, measured)
            list(writer.segments()), writer.decoder()  # once more, with what the first ones have measured
            (folder / MANIFEST).unlink()
            manifest = replace(manifest, kv=kv | {"centered": True})
        file.close()
    progress(total - 10, total, "digests")
    manifest = replace(manifest, files=_files(folder))
    return manifest


def _finished(
    manifest: Manifest, folder: Path, ids: np.ndarray | None, profiles: bool | None, progress: Progress
) -> Manifest:
    """Write the manifest of a folder that is whole but for it; profiles: as in `export`, measured on ids, if any."""
    if profiles is None:
        shape = replace(manifest.architecture, profiles=profiles_for_source(manifest))
        manifest = replace(manifest, architecture=shape)
    elif profiles and ids is not None:
        manifest = _with_profiles(manifest, folder, ids, progress)
    attached = attach(manifest, folder)
    write_text(folder, MANIFEST, attached.to_json())
    total = 10 * _total(manifest.architecture.layers)
    progress(total, total, "done")
    return attached


def _with_profiles(manifest: Manifest, folder: Path, ids: np.ndarray, progress: Progress) -> Manifest:
    """A manifest with the profiles of the bundle in a folder, which is whole but for the manifest."""
    write_text(folder, MANIFEST, manifest.to_json())
    bundle, total = NewBundle(folder), _total(manifest.architecture.layers)
    (folder / MANIFEST).unlink()

    def measured(done: int, count: int) -> None:
        progress(7 * total + (3 * total - 1) * done // count, 10 * total, "measuring layers")

    found = profiles_for(bundle, ids, measured)
    return replace(manifest, architecture=replace(manifest.architecture, profiles=found))


def _measure_keys(
    writer: GraphWriter,
    folder: Path,
    frequencies: np.ndarray,
    rotation: np.ndarray,
    ids: np.ndarray,
    progress: Callable[[int, int], None],
) -> None:
    """Have graphs centre keys and, where they are balanced, take them to a basis; and say what turns with the position,
    and how errors are fed back.
    """
    bundle = NewBundle(folder)
    if "keys" not in bundle.manifest.kv:
        writer.center(mean_keys(bundle, ids, progress))
        return
    statistics = key_statistics(bundle, ids, frequencies, progress)
    basis, means, turned = turned_keys(statistics, rotation)
    writer.center(means, basis)
    if (data := turned.data) is not None:
        (folder / KEY_TURNS).write_bytes(data)
    feedback = key_feedback(statistics, basis, rotation)
    (folder / KEY_FEEDBACK).write_bytes(feedback.astype("<f2").tobytes())


def _calibration(
    name: str, tokenizer: str | None, center: bool, keys: str, text: str | None, notes: list[str]
) -> np.ndarray | None:
    """Token ids to measure mean keys on, int64 [tokens]; None where keys are not centred, which `notes` explains.

    Raises:
        CheckpointError: a text that cannot be used, or none for keys that need one.
    """
    if tokenizer is None:
        notes.append("no tokenizer in the checkpoint: the bundle takes token ids only")
        if text is not None:
            raise CheckpointError(f"{name} has no tokenizer to read the calibration text with; leave it out")
        if center:
            notes.append("keys not centred: there is no tokenizer to calibrate with")
    if tokenizer is None or not center:
        if keys != "plain":
            raise CheckpointError(f"keys cannot be {keys} without a tokenizer and centring; leave it out")
        return None
    ids = calibration_ids(tokenizer, calibration_text() if text is None else text)
    if len(ids) < 2:
        raise CheckpointError("the calibration text has fewer than two tokens; give a few paragraphs")
    return ids


def _text_of_weights(ids: np.ndarray | None, tokenizer: str | None, text: str | None) -> np.ndarray | None:
    """Token ids to measure errors of weights on: those of the keys, or where keys need none, read for it."""
    if ids is not None or tokenizer is None:
        return ids
    return calibration_ids(tokenizer, text or calibration_text())


def _rotation_of_values(checkpoint: Checkpoint, weights: str, activations: str, block: int, turns: bool) -> str:
    """Where values are rotated, see `GraphOptions.values`: not inside weights that stay on grids of their source."""
    attends = [layer.attend for layer in checkpoint.model.layers]
    names = [name for attend in attends for name in (attend.inputs.weights[-1], *attend.output.weights)]
    if all(carried_over(checkpoint, weights, activations, [name]) for name in names):
        return "online"
    stay = turns and any(on_grid(checkpoint, weights, block, attend.inputs.weights) for attend in attends)
    return "half" if stay else "folded"


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """`Manifest.files` of a folder."""
    return {f.name: {"nbytes": f.stat().st_size, "sha256": digest(f)} for f in sorted(folder.iterdir())}
