"""A family of models that kvq does not know, added as docs/adding.md says: one file, and it runs everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Value
from safetensors.numpy import load_file, save_file

from kvq.composition import open_bundle
from kvq.exporter import architectures
from kvq.exporter.architectures.description import Add, Attend, Layer, Norm, Project
from kvq.exporter.architectures.llama import GGUF, llama
from kvq.exporter.export import export
from kvq.exporter.reference import effective_model
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.discovery import discover
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from tests.tools.checkpoints import TINY, edit_config, save_checkpoint, small_tokenizer
from tests.tools.examples import examples
from tests.tools.gguf_files import Raw, write_gguf

# What somebody would write: parameters and fields of other names, queries, keys and values in one matrix with a bias,
# no bias behind attention, and a norm before and behind it.
TOY = examples()["exporter/architectures/toy.py"]
CONFIG: dict[str, Any] = {
    "model_type": "toy", "width": 64, "inner_width": 96, "depth": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 128, "epsilon": 1e-5,
    "rope_theta": 500.0, "activation": "silu",
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], 60)
PREFILL = 40


@pytest.fixture(autouse=True)
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file in place, for one test."""
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(folder)])
    for name, found in discover(architectures, "ARCHITECTURES").items():
        monkeypatch.setitem(architectures.ARCHITECTURES, name, found)
    yield
    sys.modules.pop(f"{architectures.__name__}.toy", None)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Parameters by name."""
    rng = np.random.default_rng(1)
    width, inner, head_dim = CONFIG["width"], CONFIG["inner_width"], CONFIG["head_dim"]
    queries, keys = (CONFIG[field] * head_dim for field in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"words.weight": (CONFIG["vocab_size"], width), "last.gain": (width,)}
    shapes["says.weight"] = shapes["words.weight"]
    for i in range(CONFIG["depth"]):
        shapes |= {f"trunk.{i}.{norm}.gain": (width,) for norm in ("before", "behind", "inner")}
        shapes |= {
            f"trunk.{i}.mix.all.weight": (queries + 2 * keys, width), f"trunk.{i}.mix.all.bias": (queries + 2 * keys,),
            f"trunk.{i}.mix.out.weight": (width, queries), f"trunk.{i}.open.weight": (inner, width),
            f"trunk.{i}.gate.weight": (inner, width), f"trunk.{i}.shut.weight": (width, inner),
        }  # fmt: skip
    found = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) == 2 else 50)
        found[name] = (values + name.endswith("gain")).astype(np.float32)
    return found


@pytest.fixture
def checkpoint(weights: dict[str, np.ndarray], tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, folder / "model.safetensors")
    small_tokenizer(CONFIG["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder


def reference(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The family's own computation, float64: logits [tokens, vocab]."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    heads, kv_heads, d = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    angles = np.outer(np.arange(len(ids)), CONFIG["rope_theta"] ** -(np.arange(0, d, 2) / d))
    turn = np.exp(1j * angles)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG["epsilon"]) * w[f"{name}.gain"]

    def rotary(x: np.ndarray) -> np.ndarray:
        turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    x = w["words.weight"][ids]
    for i in range(CONFIG["depth"]):
        at = f"trunk.{i}"
        mixed = norm(x, f"{at}.before") @ w[f"{at}.mix.all.weight"].T + w[f"{at}.mix.all.bias"]
        query, key, value = np.split(mixed.reshape(len(ids), -1, d), [heads, heads + kv_heads], axis=1)
        key, value = (np.repeat(part, heads // kv_heads, axis=1) for part in (rotary(key), value))
        scores = np.einsum("qhd,khd->hqk", rotary(query), key) / np.sqrt(d)
        shares = np.exp(np.where(np.tri(len(ids)) > 0, scores, -np.inf))
        attention = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), value).reshape(len(ids), -1)
        x = x + norm(attention @ w[f"{at}.mix.out.weight"].T, f"{at}.behind")
        inner = norm(x, f"{at}.inner")
        opened, gate = (inner @ w[f"{at}.{part}.weight"].T for part in ("open", "gate"))
        x = x + opened / (1 + np.exp(-opened)) * gate @ w[f"{at}.shut.weight"].T
    return norm(x, "last") @ w["says.weight"].T


def through_the_cache(bundle: Path, backend: str) -> np.ndarray:
    session = open_bundle(bundle).session("fp16", recent=128, prefill_chunk=7, backend=backend)
    logits = [session.append(IDS[:PREFILL], all_logits=True)]
    return np.concatenate(logits + [session.append([token])[None] for token in IDS[PREFILL:]])


def twin(bundle: Path) -> np.ndarray:
    with torch.inference_mode():
        return effective_model(Bundle(bundle))(torch.from_numpy(IDS)[None]).logits[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("rotate", [True, False])
def test_it_computes_what_the_family_does(
    rotate: bool, checkpoint: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", weights="fp32", rotate=rotate).path
    wanted = reference(weights, IDS)
    for backend in ("numpy", "native"):
        assert np.abs(through_the_cache(bundle, backend) - wanted).max() <= 1e-3, backend
    assert np.abs(twin(bundle) - wanted).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_its_weights_are_quantized(kind: str, checkpoint: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", weights=kind, activations="fp32").path
    wanted = twin(bundle)
    for backend in ("numpy", "native"):
        assert np.abs(through_the_cache(bundle, backend) - wanted).max() <= 1e-3, backend
    assert np.abs(wanted - reference(weights, IDS)).max() > 1e-2


def test_what_it_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    save_file({name: values for name, values in whole.items() if name != "trunk.1.mix.all.bias"}, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*trunk\.1\.mix\.all\.bias"):
        export(checkpoint, tmp_path / "bundle")
    save_file(whole | {"trunk.1.mix.out.bias": np.zeros(CONFIG["width"], np.float32)}, file)
    with pytest.raises(UnsupportedArchitectureError, match=r"trunk\.1\.mix\.out\.bias, of which"):
        export(checkpoint, tmp_path / "bundle")


def test_fields_are_checked_under_its_own_names(checkpoint: Path, tmp_path: Path) -> None:
    for field, value in (("depth", 0), ("width", "64"), ("epsilon", -1), ("rope_theta", "far"), ("activation", "gelu")):
        edit_config(checkpoint, **{field: value})
        with pytest.raises(CheckpointError, match=field):
            export(checkpoint, tmp_path / "bundle")
        edit_config(checkpoint, **{field: CONFIG[field]})


def test_a_stranger_is_told_what_is_known(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, model_type="toys")
    with pytest.raises(
        UnsupportedArchitectureError, match=r"model_type 'toys'; kvq exports these only: .*llama.*, toy$"
    ):
        export(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize("interleaved", [True, False])
def test_gguf_files_are_read_as_the_family_says(
    interleaved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", TINY | {"intermediate_size": 96}, tokenizer=False)
    file = write_gguf(tmp_path / "llama.gguf", folder, "Q8_0")
    raw = Raw.of(file).put("general.architecture", Value.STRING, b"cousin")
    raw.fields = [(name.replace(b"llama.", b"cousin."), value) for name, value in raw.fields]
    raw.tensors = [(name.replace(b"attn_q", b"ask"), tensor) for name, tensor in raw.tensors]
    (tmp_path / "cousin.gguf").write_bytes(raw.bytes())
    with pytest.raises(UnsupportedArchitectureError, match=r"architecture 'cousin'; kvq exports these only: .*llama"):
        export(tmp_path / "cousin.gguf", tmp_path / "bundle")
    layer = {name.replace("attn_q", "ask"): hf for name, hf in GGUF.layer.items()}
    dialect = replace(GGUF, architecture="cousin", layer=layer)
    dialect = dialect if interleaved else replace(dialect, interleaved={})
    monkeypatch.setitem(architectures.ARCHITECTURES, "cousin", architectures.Family(llama, dialect))
    found, known = (export(tmp_path / f"{name}.gguf", tmp_path / name) for name in ("cousin", "llama"))
    assert (found.manifest.files[WEIGHTS] == known.manifest.files[WEIGHTS]) == interleaved


def test_steps_that_no_layer_has_are_refused() -> None:
    attend = Attend(Project(("a",), (24,), 8), Project(("b",), (8,), 8))
    for steps in ([Add()], [attend], [Add(), attend, Add()], [attend, Add(), attend, Add()], [attend, Norm("n", 8, 1)]):
        with pytest.raises(ValueError, match="one Attend"):
            Layer.of(*steps)
