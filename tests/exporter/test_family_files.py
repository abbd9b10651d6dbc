"""What GGUF files say of the families in keys and tensors of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType as Value

from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.sources.gguf_rope import FACTORS
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from tests.tools.families import SMALL, save_family
from tests.tools.gguf_files import Raw, write_gguf


def written(folder: Path, family: str, changes: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A GGUF file of a family; `fields` as for `write_gguf`."""
    checkpoint = save_family(folder / "checkpoint", SMALL[family] | (changes or {}), tokenizer=False)
    return write_gguf(folder / "model.gguf", checkpoint, **fields)


def test_gemma_s_local_base_may_be_in_the_file(tmp_path: Path) -> None:
    wide, local = load_checkpoint(written(tmp_path, "gemma3", gemma3__rope__freq_base_swa=5000.0)).model.rotaries
    np.testing.assert_allclose(local.inv_freq[1], 5000.0 ** (-2 / 256), rtol=1e-6)
    np.testing.assert_allclose(wide.inv_freq[1], 1e6 ** (-2 / 256), rtol=1e-6)


@pytest.mark.parametrize(
    ("said", "local"),
    [(None, [1, 1, 1, 1, 1, 0, 1]), (2, [1, 0, 1, 0, 1, 0, 1]),
     ([False, True] * 3 + [True], [0, 1, 0, 1, 0, 1, 1])],
)  # fmt: skip
def test_which_layers_see_a_window(said: object, local: list[int], tmp_path: Path) -> None:
    model = load_checkpoint(written(tmp_path, "gemma3", gemma3__attention__sliding_window_pattern=said)).model
    assert [layer.attend.rotary for layer in model.layers] == local


def test_queries_of_the_largest_gemma_are_scaled_otherwise(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 62, "head_dim": 32, "intermediate_size": 32, "query_pre_attn_scalar": 16}
    model = load_checkpoint(written(tmp_path, "gemma3", changes)).model
    assert model.adapted["model.layers.0.self_attn.q_norm.weight"].factor == pytest.approx(math.sqrt(32 / 16))


def test_olmo_3_is_not_taken_for_olmo_2(tmp_path: Path) -> None:
    file = written(tmp_path, "olmo2", olmo2__attention__sliding_window=64)
    with pytest.raises(UnsupportedArchitectureError, match="sliding_window=64; kvq supports None only"):
        load_checkpoint(file)


@pytest.mark.parametrize("window", [0, 100, 4096])
def test_a_window_of_phi_is_that_of_its_layers(window: int, tmp_path: Path) -> None:
    shape = load_checkpoint(written(tmp_path, "phi3", phi3__attention__sliding_window=window)).model.shape
    assert shape.context == 256
    assert shape.windows == ((100,) * shape.layers if window == 100 else ())


def test_factors_come_in_pairs_of_the_right_size(tmp_path: Path) -> None:
    file = written(tmp_path, "phi3")
    for name in FACTORS[1:]:
        (tmp_path / "half.gguf").write_bytes(Raw.of(file).without(name).bytes())
        with pytest.raises(CheckpointError, match=r"has rope_factors_\w+\.weight alone"):
            load_checkpoint(tmp_path / "half.gguf")
        raw = Raw.of(file)
        raw.tensor(name).dims = [11]
        raw.tensor(name).data = raw.tensor(name).data[:44]
        (tmp_path / "short.gguf").write_bytes(raw.bytes())
        with pytest.raises(CheckpointError, match=rf"{name} of short.gguf has the shape \(11,\), not \(12,\)"):
            load_checkpoint(tmp_path / "short.gguf")


@pytest.mark.parametrize("rotated", [0, 33, 34, 1 << 20])
def test_rotated_channels_are_pairs_of_a_head(rotated: int, tmp_path: Path) -> None:
    raw = Raw.of(written(tmp_path, "phi3")).put("phi3.rope.dimension_count", Value.UINT32, rotated)
    (tmp_path / "bad.gguf").write_bytes(raw.bytes())
    with pytest.raises(CheckpointError, match=r"rope\.dimension_count|partial_rotary_factor|rope_factors_"):
        load_checkpoint(tmp_path / "bad.gguf")


@pytest.mark.parametrize("key", ["attention.scale", "embedding_scale", "residual_scale", "logit_scale"])
def test_multipliers_of_a_file_are_numbers(key: str, tmp_path: Path) -> None:
    file = written(tmp_path, "granite")
    for value in (0.0, -1.0, math.nan, math.inf):
        (tmp_path / "bad.gguf").write_bytes(Raw.of(file).put(f"granite.{key}", Value.FLOAT32, value).bytes())
        with pytest.raises(CheckpointError, match=key):
            load_checkpoint(tmp_path / "bad.gguf")
