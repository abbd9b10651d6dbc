"""Families of models against transformers, on random weights: folders and GGUF files, both backends, caches of few
bits, sessions that are saved, forked and trimmed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvq.composition import open_bundle
from kvq.controller.evaluation.llama import LlamaModel
from kvq.exporter.calibration import calibration_text
from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.export import Summary, export
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from kvq.runtime.session.model import Model
from tests.tools.checkpoints import TINY, edit_config, save_checkpoint
from tests.tools.families import FEATURES, REAL, SMALL, Exported, config_of, family_logits, save_family
from tests.tools.gguf_files import write_gguf
from tests.tools.packages import needs
from tests.tools.references import effective_model, logits_of

BACKENDS = ["native", "numpy"]
PREFILL, DECODE = 60, 64
IDS = np.random.default_rng(11).integers(0, 512, PREFILL + DECODE)
TOLERANCE = 1e-3
TEXT = calibration_text()[:2000]


@functools.cache
def family_of(name: str, folder: Path) -> Exported:
    checkpoint = save_family(folder / name, SMALL[name])
    bundle = export(checkpoint, folder / f"{name}-bundle", weights="fp32", calibration=TEXT).path
    return Exported(name, checkpoint, bundle, open_bundle(bundle), family_logits(checkpoint, IDS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest, place: Path) -> Exported:
    return family_of(request.param, place)


def through_the_cache(model: Model, backend: str, chunk: int, policy: str = "fp16", **options: Any) -> np.ndarray:
    """Logits over IDS, float32 [tokens, vocab]: a prefill in chunks, the rest token by token."""
    session = model.session(policy, **{"recent": 256, "prefill_chunk": chunk, "backend": backend} | options)
    logits = [session.append(IDS[:PREFILL], all_logits=True)]
    return np.concatenate(logits + [session.append([token])[None] for token in IDS[PREFILL:]])


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max())


@pytest.mark.parametrize("chunk", [PREFILL, 7, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_transformers(backend: str, chunk: int, family: Exported) -> None:
    assert off(through_the_cache(family.model, backend, chunk), family.logits) <= TOLERANCE
    stepwise = through_the_cache(family.model, backend, chunk, prefill="stepwise")
    assert off(stepwise, family.logits) <= TOLERANCE


def test_each_feature_matters(family: Exported, tmp_path: Path) -> None:
    """A reader that overlooked a field, a norm or a bias would not pass the test above."""
    weights = load_file(family.folder / "model.safetensors")
    others: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
        field: ({field: value}, weights) for field, value in FEATURES[family.name].items()
    }
    for kind in {".".join(name.split(".")[-2:]) for name, values in weights.items() if values.ndim == 1}:
        neutral = np.float32(kind.endswith("norm.weight") and not family.name.startswith("gemma"))
        others[kind] = (
            {},
            {
                name: np.full_like(values, neutral) if name.endswith(kind) else values
                for name, values in weights.items()
            },
        )
    assert FEATURES[family.name]
    for what, (changes, values) in others.items():
        other = tmp_path / what
        other.mkdir()
        (other / "config.json").write_text((family.folder / "config.json").read_text())
        edit_config(other, **changes)
        save_file(values, other / "model.safetensors", metadata={"format": "pt"})
        assert off(family_logits(other, IDS), family.logits) > 20 * TOLERANCE, what


def test_the_twin_says_the_same(family: Exported) -> None:
    found = logits_of(effective_model(Bundle(family.bundle)), IDS).numpy()
    assert off(found, family.logits) <= TOLERANCE / 4


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_those_of_the_twin(weights: str, family: Exported, tmp_path: Path) -> None:
    options = {"weights": weights, "activations": "fp32", "compensate": False, "calibration": TEXT}
    bundle = export(family.folder, tmp_path / "bundle", **options).path
    wanted = logits_of(effective_model(Bundle(bundle)), IDS).numpy()
    for backend in BACKENDS:
        assert off(through_the_cache(open_bundle(bundle), backend, 7), wanted) <= 2 * TOLERANCE, backend
    assert off(wanted, family.logits) > TOLERANCE


LEFT_OUT = [
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    "sliding_window", "original_max_position_embeddings", "embedding_multiplier", "residual_multiplier",
    "logits_scaling", "attention_multiplier", "query_pre_attn_scalar", "rope_local_base_freq", "layer_types",
    "no_rope_layers",
]  # fmt: skip


def test_what_a_configuration_leaves_out_is_what_transformers_takes(family: Exported, tmp_path: Path) -> None:
    transformers = needs("transformers")
    weights, said = load_file(family.folder / "model.safetensors"), config_of(family.folder)
    compared = 0
    for field in set(LEFT_OUT) & said.keys():
        less = {name: value for name, value in said.items() if name != field}
        whole = less | {field: transformers.AutoConfig.for_model(**less).to_dict()[field]}
        found = []
        for number, config in enumerate((less, whole)):
            folder = tmp_path / f"{field}-{number}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            save_file(weights, folder / "model.safetensors")
            try:
                model = load_checkpoint(folder).model
                found.append((repr(model).replace(folder.name, ""), [r.inv_freq.tolist() for r in model.rotaries]))
            except CheckpointError:  # the weights are of other sizes
                found.append(("refused", []))
        assert found[0] == found[1], field
        compared += found[0][0] != "refused"
    assert compared >= 3


def digests(summary: Summary) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in summary.manifest.files.items()}


def test_a_gguf_file_gives_the_same_bundle(family: Exported, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", family.folder)
    found = export(file, tmp_path / "of-file", weights="fp32", center=False)
    folder = save_family(tmp_path / "folder", SMALL[family.name], tokenizer=False)
    wanted = export(folder, tmp_path / "of-folder", weights="fp32", center=False)
    if config_of(folder).get("rope_scaling"):  # factors of frequencies are of 32 bits in a file
        wide = through_the_cache(open_bundle(found.path), "native", PREFILL)
        assert off(wide, family.logits) <= TOLERANCE
        assert digests(found)["weights.bin"] == digests(wanted)["weights.bin"]
    else:
        assert digests(found) == digests(wanted)


@pytest.mark.slow
def test_llama_cpp_reads_such_files_as_transformers_reads_folders(family: Exported, tmp_path: Path) -> None:
    """Else the writer of these tests and the reader could be wrong alike."""
    pytest.importorskip("llama_cpp")
    # Of a model that is called Phi-3, llama.cpp knows tokens that this tokenizer does not have.
    file = write_gguf(tmp_path / "model.gguf", family.folder, tokenizer="gpt2", general__name="some")
    found = LlamaModel(file).score(IDS, "f16", 2)
    assert off(found, family.logits) <= 0.03 * np.abs(family.logits).max()  # a cache of 16 bits


@pytest.mark.parametrize("types", ["Q4_0", "Q4_1"])
def test_blocks_of_a_gguf_file_are_carried_over(types: str, family: Exported, tmp_path: Path) -> None:
    def kind(name: str) -> str:  # tables have 8 bits whatever their type
        return "Q8_0" if name.startswith(("token_embd", "output.")) else types

    file = write_gguf(tmp_path / "model.gguf", save_family(tmp_path / "wide", SMALL[family.name] | WIDE), kind)
    plain = export(file, tmp_path / "plain", weights="fp32", center=False)
    wanted = through_the_cache(open_bundle(plain.path), "numpy", PREFILL)
    carried = export(file, tmp_path / "carried", activations="fp32", center=False)
    assert carried.manifest.weights["layers"] == "int4"
    for backend in BACKENDS:
        assert off(through_the_cache(open_bundle(carried.path), backend, 7), wanted) <= TOLERANCE, backend


WIDE = {"intermediate_size": 128}  # rows of whole blocks


@pytest.mark.parametrize("policy", ["int8", "int4"])
def test_backends_agree_on_caches_of_few_bits(policy: str, family: Exported) -> None:
    options = {"recent": 4, "sink": 2}
    found = {name: through_the_cache(family.model, name, 7, policy, **options) for name in BACKENDS}
    near = np.abs(found["native"] - found["numpy"]).mean()
    far = np.abs(found["native"] - family.logits).mean()
    assert near <= 0.2 * far + 1e-5  # a number on the border of two codes may fall to either side
    assert 0 < far < (0.05 if policy == "int8" else 0.6) * np.abs(family.logits).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sessions_are_saved_forked_and_trimmed(backend: str, family: Exported, tmp_path: Path) -> None:
    session = family.model.session("k8v4", recent=8, prefill_chunk=7, backend=backend)
    session.append(IDS[:PREFILL])
    wanted = [session.append([token]) for token in IDS[PREFILL : PREFILL + 8]]
    # Tokens that left the window stay as they are, so a trim of few loses nothing but the window's own.
    again = family.model.session("k8v4", recent=8, prefill_chunk=7, backend=backend)
    again.append(IDS[:PREFILL])
    fork = again.fork()
    again.save(tmp_path / "session.kvq")
    loaded = family.model.load_session(tmp_path / "session.kvq", backend=backend)
    for one in (again, fork, loaded):
        for token, logits in zip(IDS[PREFILL : PREFILL + 8], wanted, strict=True):
            assert np.array_equal(one.append([token]), logits)
    fork.trim(PREFILL + 4)
    assert off(fork.append([IDS[PREFILL + 4]]), wanted[4]) <= 0.1 * np.abs(wanted[4]).mean() + TOLERANCE


def test_keys_are_centred_and_rotated_as_ever(family: Exported) -> None:
    kv = Bundle(family.bundle).manifest.kv
    assert (kv["rotation"], kv["centered"], kv["keys"]) == ("hadamard", True, "balanced")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_layers_of_real_models(name: str, tmp_path: Path) -> None:
    """Heads and residual as published; the feed-forward network is narrower, whose width nothing depends on."""
    layers = REAL[name].get("num_hidden_layers", 3)
    fields = REAL[name] | {"num_hidden_layers": 1 if layers == 3 else layers, "intermediate_size": 768}
    folder = save_family(tmp_path / "checkpoint", fields, tokenizer=False)
    model = open_bundle(export(folder, tmp_path / "bundle", weights="fp32", center=False).path)
    wanted = family_logits(folder, IDS)
    for backend, chunk in (("native", PREFILL), ("native", 7), ("numpy", PREFILL)):
        assert off(through_the_cache(model, backend, chunk), wanted) <= TOLERANCE, (backend, chunk)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("mixtral", "mixtures of experts"), ("qwen3_moe", "mixtures of experts"), ("lfm2", "convolutions"),
     ("gemma2", "soft-capped logits"), ("deepseek_v3", "latent attention"), ("mamba2", "recurrent state"),
     ("gpt_neox", "side by side")],
)  # fmt: skip
def test_other_families_are_refused_by_name(kind: str, missing: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "c", TINY, tokenizer=False)
    file = write_gguf(tmp_path / "m.gguf", folder, general__architecture=kind.replace("_", ""))
    edit_config(folder, model_type=kind)
    for checkpoint in (folder, file):
        with pytest.raises(UnsupportedArchitectureError, match=f"which has .*{missing}.* that kvq lacks; kvq exports"):
            export(checkpoint, tmp_path / "bundle")


def test_rotary_factors_are_those_of_the_context(tmp_path: Path) -> None:
    folder, ids = save_family(tmp_path / "c", SMALL["phi3"], tokenizer=False), np.resize(IDS, 300)
    wanted = family_logits(folder, ids)  # of more than the original 256 tokens
    short = export(folder, tmp_path / "short", weights="fp32")
    assert short.manifest.architecture.context == 256
    assert any(note.startswith("context 256 of 2048") for note in short.notes)
    long = export(folder, tmp_path / "long", weights="fp32", context=2048)
    assert (long.manifest.architecture.context, long.notes) == (
        2048,
        [
            "no tokenizer in the checkpoint: the bundle takes token ids only",
            "keys not centred: there is no tokenizer to calibrate with",
        ],
    )
    for backend in BACKENDS:
        session = open_bundle(long.path).session("fp16", recent=512, prefill_chunk=64, backend=backend)
        assert off(session.append(ids, all_logits=True), wanted) <= TOLERANCE, backend


def test_a_context_is_at_most_the_model_s(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "c", TINY, tokenizer=False)
    assert export(folder, tmp_path / "less", context=100).manifest.architecture.context == 100
    for context in (257, 0):
        with pytest.raises(CheckpointError, match="context of 256 tokens; give a context from 1 to 256"):
            export(folder, tmp_path / "more", context=context)


@pytest.mark.parametrize("factor", [0, -1, 1.5, 0.03, "half"])
def test_parts_of_heads_are_whole_pairs(factor: object, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "c", SMALL["phi3"], tokenizer=False)
    edit_config(folder, partial_rotary_factor=factor)
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        export(folder, tmp_path / "bundle")


@pytest.mark.parametrize("kinds", [["full_attention"], "sliding_attention", ["chunked_attention"] * 7])
def test_kinds_of_layers_are_one_of_two(kinds: object, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "c", SMALL["gemma3"], tokenizer=False)
    edit_config(folder, layer_types=kinds)
    with pytest.raises(CheckpointError, match="layer_types"):
        export(folder, tmp_path / "bundle")


@pytest.mark.parametrize("flags", [[1, 0], [2] * 5, "0", [1, 0, None, 1, 1]])
def test_layers_without_rotary_embedding_are_told_by_flags(flags: object, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "c", SMALL["smollm3"], tokenizer=False)
    edit_config(folder, no_rope_layers=flags)
    with pytest.raises(CheckpointError, match="no_rope_layers"):
        export(folder, tmp_path / "bundle")


@pytest.mark.parametrize("field", ["embedding_multiplier", "residual_multiplier", "logits_scaling"])
def test_multipliers_are_numbers(field: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "c", SMALL["granite"], tokenizer=False)
    for value in (0, -1, "many", True):
        edit_config(folder, **{field: value})
        with pytest.raises(CheckpointError, match=field):
            export(folder, tmp_path / "bundle")
