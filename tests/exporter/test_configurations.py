"""config.json in all its dialects, and with values that no model has."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from tests.tools.checkpoints import TINY, edit_config, save_checkpoint
from tests.tools.work import bounded_work

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy, beside the one line
SMALL = TINY | {"intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 8}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7,
    "beta_fast": 16.0, "beta_slow": 2.0,
}  # fmt: skip
# None, which is a default, is tested apart.
BAD = [-1, 0, -0.5, "64", True, False, math.nan, math.inf, -math.inf, 1 << 40, 10**30, 1e300, [64], {"64": 64}]
SIZES = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("small") / "c", SMALL, tokenizer=False)


@pytest.fixture
def checkpoint(small: Path) -> Path:
    """The small checkpoint, whose config.json is as new: weights are only read."""
    kept = small / "config.kept"
    if not kept.exists():
        kept.write_text((small / "config.json").read_text())
    (small / "config.json").write_text(kept.read_text())
    return small


def refusal(checkpoint: Path, **changes: Any) -> CheckpointError:
    """Change config.json, expect a refusal of one line at once; return the error."""
    edit_config(checkpoint, **changes)
    with bounded_work(clock=time.process_time), pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    assert re.search("[;:] ", str(caught.value))
    return caught.value


@pytest.mark.parametrize("field", [*SIZES, "rms_norm_eps", "rope_theta"])
def test_values_that_no_size_has_are_refused_by_name(field: str, checkpoint: Path) -> None:
    for value in [*BAD, 64.5, 64.0] if field in SIZES else BAD:
        error = refusal(checkpoint, **{field: value})
        assert field in str(error), (value, error)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_values_that_no_scaling_has_are_refused_by_name(kind: str, place: str, checkpoint: Path) -> None:
    scaling = LLAMA3 if kind == "llama3" else YARN
    for field in [*scaling, "rope_theta"]:
        for value in BAD:
            if field == "rope_theta" and place == "rope_scaling":
                continue
            error = refusal(checkpoint, **{place: scaling | {field: value}})
            assert (repr(value)[:60] if field == "rope_type" else field) in str(error), (value, error)


def test_what_a_scaling_lacks_is_named(checkpoint: Path) -> None:
    for field in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        for lacking in ({k: v for k, v in LLAMA3.items() if k != field}, LLAMA3 | {field: None}):
            error = str(refusal(checkpoint, rope_scaling=lacking))
            assert "rope_scaling of c is" in error


@pytest.mark.parametrize("value", ["linear", 4, True, ["linear", 4.0], 0.5])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_scaling_that_is_no_object_is_refused_by_name(place: str, value: Any, checkpoint: Path) -> None:
    assert f"{place}={value!r}" in str(refusal(checkpoint, **{place: value}))


def test_partly_rotated_heads_are_refused_by_name(checkpoint: Path) -> None:
    for changes in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ):
        error = refusal(checkpoint, **changes)
        assert isinstance(error, UnsupportedArchitectureError)
        assert "partial_rotary_factor=0.5" in str(error)
        edit_config(checkpoint, partial_rotary_factor=1.0)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3, YARN])
def test_rope_parameters_equal_rope_theta_and_rope_scaling(
    scaling: dict[str, Any] | None, checkpoint: Path, tmp_path: Path
) -> None:
    kept = (checkpoint / "config.json").read_text()
    edit_config(checkpoint, rope_theta=500.0, rope_scaling=scaling)
    old = export(checkpoint, tmp_path / "old", weights="fp32", center=False)
    frequencies = load_checkpoint(checkpoint).model.rotaries[0].inv_freq
    config = json.loads(kept)
    config.pop("rope_theta", None), config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}
    (checkpoint / "config.json").write_text(json.dumps(config))
    new = export(checkpoint, tmp_path / "new", weights="fp32", center=False)
    assert {f: e["sha256"] for f, e in old.manifest.files.items()} == {
        f: e["sha256"] for f, e in new.manifest.files.items()
    }
    (checkpoint / "config.json").write_text(kept)
    assert np.abs(frequencies - load_checkpoint(checkpoint).model.rotaries[0].inv_freq).max() > 1e-3


UNREAD = {
    "a field of another kind": {"rope_scaling": LLAMA3 | {"beta_fast": 16.0}},
    "a field of nobody": {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "short_factor": [1.0]}},
    "a base for some layers": {"rope_local_base_freq": 10000.0},
    "parameters of layer types": {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
    "a factor without a kind": {"rope_scaling": {"factor": 4.0}},
    "interleaved halves": {"rope_interleaved": True},
    "layers without": {"no_rope_layers": [1, 0]},
    "a part of a head": {"rotary_pct": 0.25},
    "the same, by another name": {"rotary_dim": 4},
}


@pytest.mark.parametrize("name", UNREAD)
def test_fields_of_the_rotary_embedding_that_nobody_reads_are_refused(name: str, checkpoint: Path) -> None:
    error = refusal(checkpoint, **UNREAD[name])
    assert isinstance(error, UnsupportedArchitectureError)
    assert "does not read" in str(error)


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}},
     {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "rope_scaling": {"type": "linear"}},
     {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}],
    ids=["two factors", "two kinds", "two kinds in one"],
)  # fmt: skip
def test_a_configuration_that_contradicts_itself_is_refused(changes: dict[str, Any], checkpoint: Path) -> None:
    assert re.search("twice|two kinds", str(refusal(checkpoint, **changes)))


@pytest.mark.parametrize("field", ["rope_interleaved", "rope_local_base_freq", "rotary_dim", "no_rope_layers"])
def test_fields_that_say_nothing_change_nothing(field: str, checkpoint: Path) -> None:
    expected = load_checkpoint(checkpoint).model.rotaries[0].inv_freq
    for value in (None, False):
        edit_config(checkpoint, **{field: value})
        assert np.array_equal(load_checkpoint(checkpoint).model.rotaries[0].inv_freq, expected)


def test_a_parameter_of_another_shape_is_named_whole(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "c", SMALL | {"tie_word_embeddings": False}, tokenizer=False)
    edit_config(folder, vocab_size=500)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        error = str(refusal(folder))
        assert f"first {name}, which has the shape (512, 64), not (500, 64)" in error
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name][:500]
        save_file(tensors, folder / "model.safetensors")
    load_checkpoint(folder)


def test_fields_that_are_null_or_absent_take_the_usual_values(checkpoint: Path) -> None:
    kept = json.loads((checkpoint / "config.json").read_text())
    for field, usual in (("head_dim", 8), ("max_position_embeddings", 2048)):
        for changed in (kept | {field: None}, {k: v for k, v in kept.items() if k != field}):
            (checkpoint / "config.json").write_text(json.dumps(changed))
            shape = load_checkpoint(checkpoint).architecture
            assert {"head_dim": shape.head_dim, "max_position_embeddings": shape.context}[field] == usual
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in kept.items() if k != field}))
        assert field in str(refusal(checkpoint))


def test_texts_too_long_for_a_manifest_stay_outside(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, license="x" * (1 << 21))
    tokens = checkpoint / "special_tokens_map.json"
    tokens.write_text(json.dumps({"bos_token": "x" * (1 << 21), "eos_token": "</s>"}))
    try:
        export(checkpoint, tmp_path / "bundle", weights="fp32", center=False)
    finally:
        tokens.unlink()
    assert Bundle(tmp_path / "bundle").manifest.special_tokens == {"eos_token": "</s>"}
