"""Checkpoints that cannot be exported: one line that names cause and remedy, and nothing left on disk."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from tests.tools.checkpoints import edit_config, small_tokenizer
from tests.tools.work import SOME, bounded_work

Damage = Callable[[Path], Any]
WEIGHTS = "model.safetensors"
# What a remedy begins with, after the cause and a semicolon or colon.
REMEDY = re.compile(
    r"[;:] (kvq (supports|exports) |known: |head_dim must "
    r"|(give|check|choose|convert|pass|add|fix|use|download|copy|leave|export) )"
)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoints" / "tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to export to: a name in an otherwise empty folder."""
    folder = tmp_path / "exports"
    folder.mkdir()
    return folder / "bundle"


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and the empty folders, by relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in folder.rglob("*")}


def refusal(checkpoint: Path | str, out: Path, **options: Any) -> CheckpointError:
    """Export, expect a refusal of one line with cause and remedy and an untouched target; return the error."""
    before = content(out.parent)
    with pytest.raises(CheckpointError) as caught:
        export(str(checkpoint), out, weights="fp32", **options)
    assert content(out.parent) == before
    message = str(caught.value)
    assert "\n" not in message
    assert REMEDY.search(message), f"no remedy in: {message}"
    return caught.value


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path, keep: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(keep * len(data))])


def lose_a_shard(folder: Path) -> None:
    """An index of two shards of which one is there."""
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def foreign_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids all lie beyond the vocabulary of 512."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] = {token: i + 512 for token, i in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["id"] += 512
    file.write_text(json.dumps(data))


DAMAGED: list[tuple[str, Damage, str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "no config.json"),
    (
        "config not JSON",
        lambda f: (f / "config.json").write_text('{"model_type": "lla'),
        "config.json .*not valid JSON",
    ),
    ("config not UTF-8", lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff"}'), "config.json"),
    ("config of wrong types", lambda f: edit_config(f, hidden_size="many"), "config.json"),
    ("no KV heads", lambda f: edit_config(f, num_key_value_heads=0), "KV heads|num_key_value_heads"),
    ("no heads", lambda f: edit_config(f, num_attention_heads=0, head_dim=None), "heads"),
    ("pickle only", only_pickle, "pickle.*pytorch_model.bin"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), "no .safetensors weights"),
    ("weights cut in the data", lambda f: cut_weights(f, 0.7), "weights of tiny cannot be read"),
    ("weights cut in the header", lambda f: cut_weights(f, 0.001), "weights of tiny cannot be read"),
    ("weights empty", lambda f: cut_weights(f, 0), "weights of tiny cannot be read"),
    ("a shard missing", lose_a_shard, "weights of tiny cannot be read"),
    (
        "a tensor missing",
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks 1 weights.*model.layers.1.mlp.up_proj.weight",
    ),
    ("another ffn", lambda f: edit_config(f, intermediate_size=128), "shape"),
    ("another vocabulary", lambda f: edit_config(f, vocab_size=600), "shape"),
    ("more layers", lambda f: edit_config(f, num_hidden_layers=4), "lacks 9 weights.*model.layers.3"),
    ("foreign tokenizer", foreign_tokenizer, "tokenizer of tiny.*512 embeddings"),
    ("tokenizer not JSON", lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    ("tokenizer not UTF-8", lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "tokenizer"),
    (
        "rope scaling without its factor",
        lambda f: edit_config(f, rope_scaling={"rope_type": "linear"}),
        "rope_scaling|config.json|rotary",
    ),
]
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("model_type", {"model_type": "gpt2"}, "model_type 'gpt2'"),
    ("no model_type", {"model_type": None}, "model_type None"),
    ("dynamic rope", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("dynamic rope, old key", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("unknown rope", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral'"),
    ("gelu", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("quantized", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config="),
    ("head_dim", {"head_dim": 12}, "head_dim 12"),
    ("ungrouped heads", {"num_key_value_heads": 3}, "3 KV heads"),
]


@pytest.mark.parametrize(("damage", "cause"), [pytest.param(*row[1:], id=row[0]) for row in DAMAGED])
def test_damaged_checkpoint_is_refused(damage: Damage, cause: str, checkpoint: Path, out: Path) -> None:
    damage(checkpoint)
    message = str(refusal(checkpoint, out))
    assert re.search(cause, message), message


@pytest.mark.parametrize(("changes", "cause"), [pytest.param(*row[1:], id=row[0]) for row in UNSUPPORTED])
def test_unsupported_architecture_is_refused(changes: dict[str, Any], cause: str, checkpoint: Path, out: Path) -> None:
    error = refusal(edit_config(checkpoint, **changes), out)
    assert isinstance(error, UnsupportedArchitectureError)
    assert re.search(cause, str(error)), error


def test_tokenizer_larger_than_the_vocabulary_is_refused_without_calibration_too(checkpoint: Path, out: Path) -> None:
    small_tokenizer(560).save(str(checkpoint / "tokenizer.json"))  # some ids fit, some do not
    assert "512 embeddings" in str(refusal(checkpoint, out, center=False))


def test_missing_folder_is_refused_without_asking_the_hub(tmp_path: Path, out: Path) -> None:
    assert "no checkpoint folder" in str(refusal(tmp_path / "nowhere", out))


def test_hub_out_of_reach_is_refused_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read on import
    with bounded_work(SOME, time.monotonic):
        message = str(refusal("kvq-tests/no-such-model", out))
    assert "kvq-tests/no-such-model" in message
    assert "cannot be fetched from the hub" in message


def test_existing_bundle_is_not_replaced_unless_asked(checkpoint: Path, tiny_bundle: Path, out: Path) -> None:
    shutil.copytree(tiny_bundle, out)
    assert "--overwrite" in str(refusal(checkpoint, out))
    summary = export(str(checkpoint), out, weights="int8", overwrite=True)
    assert Bundle(out).manifest == summary.manifest
    assert summary.manifest.weights["layers"] == "int8"
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    assert sorted(f.name for f in out.iterdir()) == sorted([*summary.manifest.files, MANIFEST])


def test_failed_overwrite_keeps_the_old_bundle(checkpoint: Path, tiny_bundle: Path, out: Path) -> None:
    shutil.copytree(tiny_bundle, out)
    (checkpoint / WEIGHTS).unlink()
    refusal(checkpoint, out, overwrite=True)
    Bundle(out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_no_bundle_is_never_replaced(overwrite: bool, checkpoint: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    assert "exists" in str(refusal(checkpoint, out, overwrite=overwrite))


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_is_never_replaced(overwrite: bool, checkpoint: Path, out: Path) -> None:
    out.write_text("three years of work")
    assert "exists" in str(refusal(checkpoint, out, overwrite=overwrite))


def test_checkpoint_folder_itself_is_never_the_target(checkpoint: Path) -> None:
    assert "exists" in str(refusal(checkpoint, checkpoint, overwrite=True))


def test_target_below_a_file_is_refused(checkpoint: Path, out: Path) -> None:
    out.write_text("a file")
    assert "cannot write" in str(refusal(checkpoint, out / "bundle"))


def test_weights_that_are_not_finite_are_refused(checkpoint: Path, out: Path) -> None:
    """Quantization would turn a NaN into some code, and nothing downstream could notice."""
    tensors = load_file(checkpoint / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in str(refusal(checkpoint, out))
