"""Bundles made from GGUF files against transformers on the weights that the gguf package reads from them."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from kvq.composition import open_bundle
from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.cli import export as export_command
from kvq.exporter.export import Summary, export
from kvq.exporter.weights.quantize import packed
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import CHAT_TEMPLATE, WEIGHTS
from kvq.runtime.errors import UnsupportedArchitectureError
from kvq.runtime.session.model import Model
from tests.tools.checkpoints import TINY, save_checkpoint, small_tokenizer
from tests.tools.gguf_files import GGUF_TINY, Raw, theirs, write_dequantized, write_gguf
from tests.tools.references import effective_model, logits_of, reference_logits

IDS = np.random.default_rng(5).integers(0, 512, 48)
PREFILL = 40
EXACT = {"Q4_0": 4, "Q5_0": 8, "Q8_0": 8, "Q6_K": 8}
# Where blocks have halves: scales, and minima.
HALVES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208], "Q4_1": [0, 2], "Q4_K": [0, 2]}
TYPES = [
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
]  # fmt: skip
BACKENDS = ["native", "numpy"]


def mixture(name: str) -> str:
    """Types as in a Q4_K_M file."""
    return {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}.get(name.split(".")[-2], "Q4_K")


def keeping(name: str) -> str:
    """Types of which every matrix is carried over, though those of a stack differ."""
    return {"attn_q": "Q4_0", "attn_k": "Q5_0", "attn_v": "Q6_K", "ffn_gate": "Q4_0", "ffn_up": "Q8_0"}.get(
        name.split(".")[-2], "Q4_0"
    )


MIXED = {"mixture": mixture, "keeping": keeping}


class Pair:
    """A GGUF file, the folder of the weights in it, and transformers' logits for that folder."""

    def __init__(self, folder: Path, checkpoint: Path, types: str, **fields: Any) -> None:
        self.file = write_gguf(folder / "model.gguf", checkpoint, MIXED.get(types, types), **fields)
        self.folder = write_dequantized(self.file, checkpoint, folder / "dequantized")
        self.logits = reference_logits(self.folder, IDS.tolist()).numpy()

    def off(self, logits: np.ndarray) -> float:
        return float(np.abs(logits - self.logits).max())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints without tokenizer, by whether the head is tied."""
    folder = tmp_path_factory.mktemp("checkpoints")
    fields = GGUF_TINY | {"head_dim": 32}
    return {
        tied: save_checkpoint(folder / f"{tied}", fields | {"tie_word_embeddings": tied}, tokenizer=False)
        for tied in (True, False)
    }


def through_the_cache(model: Model, backend: str, chunk: int, **options: Any) -> np.ndarray:
    session = model.session(options.pop("policy", "fp16"), recent=256, prefill_chunk=chunk, backend=backend, **options)
    logits = [session.append(IDS[:PREFILL], all_logits=True)]
    return np.concatenate(logits + [session.append([token])[None] for token in IDS[PREFILL:]])


def at_once(summary: Summary) -> np.ndarray:
    return open_bundle(summary.path).session("fp16", recent=64, prefill_chunk=len(IDS)).append(IDS, all_logits=True)


@pytest.mark.parametrize("types", [*TYPES, *MIXED])
def test_decoded_weights_are_those_that_gguf_reads(types: str, checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    pair = Pair(tmp_path, checkpoints[types in ("F16", "Q4_0", "Q4_K")], types)
    ours = export(pair.file, tmp_path / "ours", weights="fp32", center=False)
    folder = export(pair.folder, tmp_path / "folder", weights="fp32", center=False)
    assert ours.manifest.files[WEIGHTS] == folder.manifest.files[WEIGHTS]
    assert pair.off(at_once(ours)) <= 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("types", [*EXACT, "keeping"])
def test_blocks_are_carried_over_exactly(types: str, tied: bool, checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    pair = Pair(tmp_path, checkpoints[tied], types)
    summary = export(pair.file, tmp_path / "bundle", activations="fp32", center=False)
    manifest, shape, bits = summary.manifest, summary.manifest.architecture, EXACT.get(types)
    matrices = 4 * shape.layers + (1 if tied else 2)
    assert manifest.kv["values"] == "online"
    layers = f"int{bits}" if bits else "mixed"
    assert manifest.weights == manifest.weights | {
        "layers": layers, "head": "int8", "exact": matrices, "matrices": matrices,
    }  # fmt: skip
    nodes = [
        {a.name: a.i for a in node.attribute} | {"weights": node.input[1]}
        for node in onnx.load(summary.path / manifest.decoder, load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    ]
    wide = ("q_proj+k_proj+v_proj", "gate_proj+up_proj") if types == "keeping" else ()
    nbytes = 0
    for node in nodes:
        wanted = bits or (8 if any(part in node["weights"] for part in wide) else 4)
        assert node["bits"] == wanted, node
        assert node["block_size"] == (16 if types == "Q6_K" or ("q_proj" in node["weights"] and not bits) else 32), node
        nbytes += node["N"] * node["K"] * node["bits"] // 8 + 4 * node["N"] * node["K"] // node["block_size"]
    head = shape.vocab * shape.hidden
    assert len(nodes) == 4 * shape.layers
    assert manifest.decode_weight_nbytes == nbytes + head + 4 * head // (16 if types == "Q6_K" else 32)
    model = open_bundle(summary.path)
    for backend, chunk in itertools.product(BACKENDS, [PREFILL, 7]):
        assert pair.off(through_the_cache(model, backend, chunk)) <= 1e-3
        assert pair.off(through_the_cache(model, backend, chunk, prefill="stepwise")) <= 1e-3
    assert pair.off(logits_of(effective_model(Bundle(summary.path)), IDS).numpy()) <= 1e-4


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("types", HALVES)
def test_any_blocks_of_an_exact_type_are_carried_over_as_they_are(types: str, tmp_path: Path) -> None:
    """Whatever the bytes: scales negative, of no size at all or of all there is; those that are no number are not.

    What is multiplied of blocks with minima may be rounded once more, where minimum and scale are of different sizes.
    """
    folder = save_checkpoint(tmp_path / "c", GGUF_TINY | {"head_dim": 32, "num_hidden_layers": 1}, tokenizer=False)
    raw = Raw.of(write_gguf(tmp_path / "m.gguf", folder, types))
    for seed, (scales, carried) in enumerate(((0x7BFF, True), (0x7FFF, False))):
        for number, (_, tensor) in enumerate(raw.tensors):
            if len(tensor.dims) == 2:
                blocks = np.frombuffer(np.random.default_rng([seed, number]).bytes(len(tensor.data)), np.uint8)
                blocks = blocks.reshape(-1, GGML_QUANT_SIZES[Type[types]][1]).copy()
                for at in HALVES[types]:
                    halves = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.uint16)
                    halves[halves & 0x7C00 == 0x7C00] &= 0x83FF  # no infinity, no NaN
                    halves[:4, 0] = 0, 0x8000, 0x8001, scales if at == HALVES[types][-1] else 0x7BFF
                    blocks[:, at : at + 2] = halves.view(np.uint8)
                tensor.data = blocks.tobytes()
        (tmp_path / "m.gguf").write_bytes(raw.bytes())
        source = load_checkpoint(tmp_path / "m.gguf").source
        for name, shape in source.shapes.items():
            if len(shape) == 2:
                blocks = source.blocks(name)
                assert (blocks is not None) == carried, name
                if blocks is not None:
                    wanted, found = source.read(name), packed(blocks)
                    assert np.array_equal(blocks.dequantize(), wanted), name
                    if found.offsets is None:
                        assert np.array_equal(found.dequantize(), wanted), name
                    else:
                        largest = np.abs([8 * blocks.scales, blocks.minima]).max(0)
                        error = np.abs(found.dequantize() - wanted).reshape(*largest.shape, -1).max(-1)
                        assert (error <= 2**-22 * largest).all(), name


@pytest.mark.parametrize("types", ["F16", "Q5_1", "Q3_K", "Q5_K"])
def test_other_types_cost_what_eight_bits_cost(types: str, checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    pair = Pair(tmp_path, checkpoints[True], types)
    summary = export(pair.file, tmp_path / "bundle", activations="fp32", center=False)
    assert summary.manifest.kv["values"] == "folded"
    assert summary.manifest.weights["layers"] == "int8"
    assert summary.manifest.weights["exact"] == 0
    error = np.square(at_once(summary) - pair.logits).mean() / np.square(pair.logits).mean()
    assert 0 < error < 1e-3
    twin = logits_of(effective_model(Bundle(summary.path)), IDS).numpy()
    assert np.abs(at_once(summary) - twin).max() <= 1e-3


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_what_is_carried_over_at_which_bits(
    weights: str, rotate: bool, checkpoints: dict[bool, Path], tmp_path: Path
) -> None:
    pair = Pair(tmp_path, checkpoints[False], "Q4_0")
    summary = export(pair.file, tmp_path / "bundle", weights=weights, activations="fp32", center=False, rotate=rotate)
    found = summary.manifest.weights
    assert (found["layers"], found["exact"]) == ("int8" if weights == "int8" else "int4", found["matrices"])
    assert pair.off(at_once(summary)) <= 1e-3


@pytest.mark.parametrize("policy", ["int8", "int4", "rule"])
def test_backends_agree_on_quantized_values_that_are_rotated_as_they_come(
    policy: str, online_bundle: Path, checkpoints: dict[bool, Path]
) -> None:
    model = open_bundle(online_bundle)
    logits = {}
    for backend in BACKENDS:
        session = model.session(policy, recent=4, sink=2, prefill_chunk=7, backend=backend)
        first = session.append(IDS[:PREFILL], all_logits=True)
        logits[backend] = np.concatenate([first, *(session.append([token])[None] for token in IDS[PREFILL:])])
        if backend == "native":
            assert session.stats().kv_used_bits < 16
    whole = through_the_cache(model, "native", PREFILL)
    near, far = (np.abs(logits["native"] - other).mean() for other in (logits["numpy"], whole))
    assert near <= 0.05 * far + 1e-4
    assert 0 < far < (0.02 if policy == "int8" else 0.5) * np.abs(whole).mean()


@pytest.fixture(scope="module")
def online_bundle(checkpoints: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose values are rotated as they come, centred, with a tokenizer."""
    folder = tmp_path_factory.mktemp("online")
    file = write_gguf(folder / "m.gguf", checkpoints[True], "Q8_0", tokenizer="gpt2")
    summary = export(file, folder / "bundle", activations="fp32", calibration="A text to measure keys on. " * 9)
    assert summary.manifest.kv == {"rotation": "hadamard", "centered": True, "values": "online", "keys": "balanced"}
    return summary.path


def test_rotating_values_as_they_come_rotates_what_is_stored(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoints[True], "Q8_0")
    stored = {}
    for rotate, weights in ((True, "auto"), (True, "fp32"), (False, "auto")):
        bundle = export(
            file, tmp_path / f"{rotate}{weights}", weights=weights, activations="fp32", center=False, rotate=rotate
        )
        for backend in BACKENDS:
            session = open_bundle(bundle.path).session("fp16", recent=64, backend=backend)
            session.append(IDS)
            stored[rotate, weights, backend] = session.store.window.read(np.arange(len(IDS)))[1]
    online, folded = stored[True, "auto", "native"], stored[True, "fp32", "native"]
    assert np.abs(online - stored[True, "auto", "numpy"]).max() <= 2e-2
    assert np.abs(online - folded).max() <= 2e-2  # 16 bits
    assert np.abs(online - stored[False, "auto", "native"]).max() > 0.5


ROPE = {
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip
SMALL = TINY | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 8}


@pytest.mark.parametrize("variant", ROPE)
def test_variants_equal_transformers(variant: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "c", SMALL | ROPE[variant], tokenizer=False)
    pair = Pair(tmp_path, checkpoint, "F32")
    plain = reference_logits(save_checkpoint(tmp_path / "plain", SMALL, tokenizer=False), IDS.tolist()).numpy()
    assert pair.off(plain) > 1e-2
    assert pair.off(at_once(export(pair.file, tmp_path / "bundle", weights="fp32", center=False))) <= 1e-4


YARN = {
    "llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0,
    "llama__rope__scaling__original_context_length": 64, "llama__rope__scaling__yarn_beta_fast": 16.0,
    "llama__rope__scaling__yarn_beta_slow": 2.0,
}  # fmt: skip


def test_scaling_follows_llama_cpp(tmp_path: Path) -> None:
    """A factor without a type is linear; type none is none whatever the factor; old files call it scale_linear."""
    plain = save_checkpoint(tmp_path / "plain", SMALL, tokenizer=False)
    linear = save_checkpoint(tmp_path / "linear", SMALL | ROPE["linear"], tokenizer=False)
    # llama.cpp multiplies its own factor with attn_factor, transformers takes attention_factor in place of its own.
    fields = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0}
    fields |= {"rope_type": "yarn", "attention_factor": 0.5 * (1 + 0.1 * math.log(4))}
    yarn = save_checkpoint(tmp_path / "yarn", SMALL | {"rope_scaling": fields}, tokenizer=False)
    wanted = {path: reference_logits(path, IDS.tolist()).numpy() for path in (plain, linear, yarn)}
    for number, (fields, path) in enumerate(
        [
            ({"llama__rope__scaling__factor": 4.0}, linear),
            ({"llama__rope__scale_linear": 4.0}, linear),
            ({"llama__rope__scaling__factor": 4.0, "llama__rope__scaling__type": "none"}, plain),
            ({"llama__rope__scaling__factor": 0.0}, plain),
            (YARN | {"llama__rope__scaling__attn_factor": 0.5}, yarn),
        ]
    ):
        file = write_gguf(tmp_path / f"{number}.gguf", plain, **fields)
        found = at_once(export(file, tmp_path / f"{number}", weights="fp32", center=False))
        assert np.abs(found - wanted[path]).max() <= 1e-4, fields


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokenizer_template_and_special_tokens(kind: str, add_bos: bool | None, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "c", SMALL, tokenizer=False)
    fields = {"tokenizer__chat_template": TEMPLATE, "tokenizer__ggml__add_bos_token": add_bos}
    file = write_gguf(tmp_path / "m.gguf", checkpoint, tokenizer=kind, tokenizer__ggml__eot_token_id=7, **fields)
    summary = export(file, tmp_path / "bundle", calibration="a few words to measure keys on")
    model, bos, text = open_bundle(summary.path), {"gpt2": 0, "llama": 1}[kind], "It was a dark night; 12 bells."
    ids = model.encode(text)
    begins = kind == "llama" if add_bos is None else add_bos
    assert (ids[0] == bos) == begins
    rest = ids[begins:]
    assert model.encode(text, beginning=False) == rest
    assert model.tokenizer.decode(rest) == text
    if kind == "gpt2":
        assert rest == small_tokenizer().encode(text).ids
    assert model.bundle.manifest.eos_token_ids == [{"gpt2": 0, "llama": 2}[kind], 7]
    texts = model.tokenizer.id_to_token
    wanted = {"bos_token": texts(bos), "eos_token": texts(bos + 1 if kind == "llama" else bos)}
    assert summary.manifest.special_tokens == wanted | ({"unk_token": "<unk>"} if kind == "llama" else {})
    assert (summary.path / CHAT_TEMPLATE).read_text() == TEMPLATE
    assert (summary.manifest.name, summary.manifest.source["licence"]) == ("m", "mit")
    assert summary.manifest.kv["centered"]


@pytest.mark.parametrize("model", [None, "no_vocab"])
def test_file_without_tokenizer_exports_with_a_note(model: str | None, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "c", SMALL, tokenizer=False)
    file = write_gguf(tmp_path / "m.gguf", checkpoint, tokenizer__ggml__model=model)
    summary = export(file, tmp_path / "bundle")
    assert not summary.manifest.kv["centered"]
    assert any("no tokenizer" in note for note in summary.notes)


def test_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "c", SMALL, tokenizer=False)
    file = write_gguf(tmp_path / "m.gguf", checkpoint, tokenizer="gpt2", tokenizer__ggml__pre="jabberwocky")
    with pytest.raises(UnsupportedArchitectureError, match=r"'jabberwocky' of m\.gguf is not known"):
        export(file, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def sharded(checkpoint: Path, dtype: Any) -> None:
    """Split a folder's weights in two with an index, in another type."""
    tensors = load_file(checkpoint / "model.safetensors")
    names, places = sorted(tensors), {}
    for shard in (0, 1):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        save_file({name: tensors[name].astype(dtype) for name in names[shard::2]}, checkpoint / file)
        places |= dict.fromkeys(names[shard::2], file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (checkpoint / "model.safetensors").unlink()


@pytest.mark.slow
def test_exports_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "c", SMALL)
    file = write_gguf(tmp_path / "m.gguf", checkpoint, "Q8_0", tokenizer="gpt2")
    sharded(checkpoint, ml_dtypes.bfloat16)
    script = (
        "import sys; from kvq.exporter.export import export\n"
        "for source, out in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    export(source, out, weights='fp32', calibration='some words to measure keys on')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    arguments = [checkpoint, tmp_path / "from-folder", file, tmp_path / "from-file"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    wanted = reference_logits(checkpoint, IDS.tolist()).numpy()
    model = open_bundle(tmp_path / "from-folder")
    found = model.session("fp16", recent=64, prefill_chunk=len(IDS)).append(IDS, all_logits=True)
    assert np.abs(found - wanted).max() <= 1e-4
    assert Tokenizer.from_file(str(tmp_path / "from-file" / "tokenizer.json")).get_vocab_size() == 512


@pytest.mark.parametrize(("weights", "layers"), [(None, "int4"), ("int4", "int4"), ("int8", "int8"), ("fp32", "fp32")])
def test_command_line(weights: str | None, layers: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "c", SMALL, tokenizer=False)
    file = write_gguf(tmp_path / "my.model.Q4_0.gguf", checkpoint, "Q4_0")
    options = [] if weights is None else ["--weights", weights]
    result = CliRunner().invoke(export_command, [str(file), str(tmp_path / "bundle"), *options])
    assert result.exit_code == 0, result.output
    manifest = Bundle(tmp_path / "bundle").manifest
    assert (manifest.name, manifest.weights["layers"]) == ("my.model.Q4_0", layers)
    assert manifest.source["types"] == {"F32": 3, "Q4_0": 8}
    assert theirs("lm_head.weight") not in manifest.source
