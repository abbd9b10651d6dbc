"""Mean keys: what a constant subtracted from all keys of a head may be, at no cost to attention."""

from __future__ import annotations

import importlib.resources

import numpy as np
import torch
from tokenizers import Tokenizer

from kvq.exporter.checkpoint import Checkpoint

MAX_TOKENS = 4096
WINDOW = 1024


def calibration_text() -> str:
    """The text used when the user gives none."""
    return importlib.resources.files("kvq.exporter").joinpath("calibration.txt").read_text(encoding="utf-8")


def calibration_ids(tokenizer_json: str, text: str) -> np.ndarray:
    """The first tokens of the text, int64 [at most MAX_TOKENS]."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    return np.asarray(tokenizer.encode(text).ids[:MAX_TOKENS], np.int64)


def mean_keys(checkpoint: Checkpoint, ids: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Mean key of every KV head after rotary embedding and rotation, float32 [layers, kv_heads, head_dim].

    Adding one vector to all keys of a head adds the same number to all scores of a row, which
    softmax ignores; but the mean is most of a key's energy in trained models, and without it the
    rest fits a finer grid. The first token is left out: as attention sink its key is an outlier.

    Args:
        checkpoint: the model.
        ids: int64 [tokens] of a calibration text; cut into windows of at most `WINDOW` tokens.
        rotation: float32 [head_dim, head_dim].
    """
    shape = checkpoint.architecture
    window = min(WINDOW, shape.context)
    total = torch.zeros(shape.layers, shape.kv_heads, shape.head_dim)
    count = 0
    for start in range(0, len(ids), window):
        part = torch.from_numpy(ids[start : start + window])[None]
        if part.shape[1] < 2:
            continue
        with torch.inference_mode():
            # Only the cache is wanted, so the head is not run.
            cache = checkpoint.model.model(part, use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            total[i] += layer.keys[0, :, 1:].sum(dim=1)
        count += part.shape[1] - 1
    return (total / max(1, count)).numpy() @ rotation
