"""Whatever shape a model has: what is exported of it is understood, and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvq
from kvq.exporter.export import export
from tests.tools.checkpoints import TINY, save_checkpoint

LAYER: dict[str, Any] = {"num_hidden_layers": 1}
# (config, options): narrow beside wide, one head, many heads, blocks that no row fills.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads far wider than the residual": (
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
        },
        {"weights": "fp32"},
    ),
    "the same, quantized": (
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
        {"weights": "int4", "block": 16, "activations": "int16-head"},
    ),
    "one head": (
        {
            "hidden_size": 40,
            "intermediate_size": 24,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 40,
        },
        {"weights": "int8", "block": 256},
    ),
    "a vocabulary beside which all else is small": (
        {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": 60_000,
        },
        {"weights": "int8", "block": 16, "activations": "int16-head"},
    ),
    "a wide middle": (
        {
            "hidden_size": 32,
            "intermediate_size": 9000,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        {"weights": "int4", "block": 128},
    ),
    "biases, an untied head, no rotation": (
        {
            "hidden_size": 48,
            "intermediate_size": 50,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
        {"weights": "fp32"},
    ),
    "many layers": ({"num_hidden_layers": 12}, {"weights": "int8"}),
    "KV heads whose means stand in weights.bin": (
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 32,
            "num_hidden_layers": 3,
        },
        {"weights": "int4", "keys": "plain"},
    ),
    "not centred": ({}, {"weights": "int4", "center": False}),
    "not rotated": ({}, {"weights": "int8", "rotate": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_export_is_understood(name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_BACKEND", backend)
    config, options = SHAPES[name]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", TINY | LAYER | config)
    model = kvq.load(export(str(checkpoint), tmp_path / "bundle", compensate=False, **options).path)
    assert np.isfinite(model.session().append([1, 2, 3])).all()
