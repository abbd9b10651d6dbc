"""Mean keys: what a constant subtracted from all keys of a head may be, at no cost to attention."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.backends import make_backend
from kvq.runtime.compute.engine import Engine
from kvq.runtime.errors import CalibrationError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.text.tokenizer import encoded, load_tokenizer

MAX_TOKENS = 4096
WINDOW, CHUNK = 1024, 256


class NewBundle(Bundle):
    """A bundle that this process has just written: its files are not read to see whether they are as written."""

    @staticmethod
    def files(folder: Path) -> dict[str, dict[str, Any]]:
        """`Manifest.files` of it, without sizes and digests."""
        return {file.name: {"nbytes": 0, "sha256": "0" * 64} for file in folder.iterdir()}

    def _check_file(self, name: str, entry: dict[str, Any]) -> None:
        pass

    def _check_content(self, name: str, data: bytes) -> None:
        pass


def calibration_text() -> str:
    """The text used when the user gives none."""
    return importlib.resources.files("kvq.exporter").joinpath("calibration.txt").read_text(encoding="utf-8")


def calibration_ids(tokenizer_json: str, text: str) -> np.ndarray:
    """The first tokens of the text, int64 [at most MAX_TOKENS]."""
    tokenizer = load_tokenizer(tokenizer_json)
    tokenizer.no_truncation()
    return np.asarray(encoded(tokenizer, text, special=True)[:MAX_TOKENS], np.int64)


def windows(ids: np.ndarray, context: int) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of a text that are read on their own, with their first place: at most `WINDOW` tokens, at least two."""
    size = min(WINDOW, context)
    for start in range(0, len(ids), size):
        if len(ids) - start > 1:
            yield start, ids[start : start + size]


def mean_of(total: np.ndarray, count: int) -> np.ndarray:
    """Mean of a sum; zero of nothing."""
    return total / max(1, count)


def check_finite(what: str, *by_layer: np.ndarray) -> None:
    """Check what a calibration text was measured to do, arrays of a layer a row.

    Raises:
        CalibrationError: it holds NaN or infinity: no model was trained to weights of this size.
    """
    for array in by_layer:
        bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
        if len(bad):
            raise CalibrationError(
                f"{what} of layer {bad[0]} are no finite numbers on the calibration text; give a checkpoint of a"
                " trained model"
            )


def mean_keys(bundle: Bundle, ids: np.ndarray, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Mean key of every KV head as the cache would hold it, float32 [layers, kv_heads, head_dim].

    Adding one vector to all keys of a head adds the same number to all scores of a row, which
    softmax ignores; but the mean is most of a key's energy in trained models, and without it the
    rest fits a finer grid. The first token is left out: as attention sink its key is an outlier.

    The runtime's own passes compute the keys, through a cache of 16 bits.

    Args:
        bundle: the model, its keys not centred yet.
        ids: int64 [tokens] of a calibration text; cut into windows of at most `WINDOW` tokens.
        progress: called with the tokens done and all there are.
    """
    shape = bundle.manifest.architecture
    engine, backend = Engine(bundle), make_backend()
    total = np.zeros((shape.layers, shape.kv_heads, shape.head_dim))
    count, passes = 0, {}
    for start, part in windows(ids, shape.context):
        store = KVStore(shape.geometry, recent=0, codecs=backend.codecs)
        for at in range(0, len(part), CHUNK):
            chunk = part[at : at + CHUNK]
            if len(chunk) not in passes:
                passes = {len(chunk): backend.forward_pass(engine, len(chunk))}
            layers = passes[len(chunk)]
            layers.forward(chunk, store)
            total += layers.keys[:, :, int(at == 0) :].sum(axis=2, dtype=np.float64)
            store.append(layers.keys, layers.values, np.full((len(chunk), 2), 16, np.uint8))
            if progress is not None:
                progress(start + at + len(chunk), len(ids))
        count += len(part) - 1
    check_finite("keys", total)
    return mean_of(total, count).astype(np.float32)
