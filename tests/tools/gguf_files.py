"""GGUF files for tests: written by the gguf package as llama.cpp's converter does it, and taken apart to be damaged."""

from __future__ import annotations

import functools
import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kvq.exporter.calibration import calibration_text
from tests.tools.checkpoints import small_tokenizer

WEIGHTS = "model.safetensors"
# Rows of 256 elements, which K-quants need; heads of 32.
GGUF_TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Where a K-quant block has its halves: the scale, and the one of minima with the middle of its codes.
HALVES = {
    Type.Q2_K: ((80, 1.0), (82, 1.5)), Type.Q3_K: ((108, 1.0),), Type.Q4_K: ((0, 1.0), (2, 7.5)),
    Type.Q5_K: ((0, 1.0), (2, 15.5)), Type.Q6_K: ((208, 1.0),),
}  # fmt: skip
# Families by model_type: GGUF's name of each, and whether its converter permutes queries and keys as Llama's does.
FAMILIES = {
    "llama": ("llama", True), "mistral": ("llama", True), "granite": ("granite", True), "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False), "smollm3": ("smollm3", True), "olmo2": ("olmo2", False),
    "phi3": ("phi3", False), "gemma3_text": ("gemma3", False),
}  # fmt: skip
# Fields that only some families have.
NUMBERS = {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
# A type of every tensor, or what names the type of a tensor of this GGUF name.
Types = str | Callable[[str], str]


def theirs(name: str, architecture: str = "llama") -> str:
    """GGUF's name of a Hugging Face parameter, by the gguf package."""
    found = _names(architecture).get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


@functools.cache
def _names(architecture: str) -> gguf.TensorNameMap:
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], 64)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def heads_of(name: str, config: Mapping[str, Any]) -> int:
    """Heads by which the rows of a Hugging Face parameter are permuted; 0 if they are not."""
    if not FAMILIES[config["model_type"]][1]:
        return 0
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
        name.split(".")[-2], 0
    )


def encoded(values: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, Type]:
    """A tensor as a file holds it; K-quants, which gguf cannot make, are random blocks of the same magnitude."""
    type_ = Type[kind]
    if values.ndim < 2:
        return values.astype(np.float32), Type.F32
    if type_ not in HALVES:
        return gguf.quants.quantize(values, type_), type_
    elements, nbytes = gguf.GGML_QUANT_SIZES[type_]
    raw = np.random.default_rng(seed).integers(0, 256, (values.size // elements, nbytes), np.uint8)

    def put(scale: float) -> np.ndarray:
        for at, factor in HALVES[type_]:
            raw[:, at : at + 2] = np.array([scale * factor], np.float16).view(np.uint8)
        return raw.reshape(len(values), -1)

    return put(float(values.std() / gguf.quants.dequantize(put(1.0), type_).std())), type_


def tokenizer_fields(kind: str | None, vocab: int) -> dict[str, Any]:
    """Metadata of a tokenizer: "gpt2" is `small_tokenizer`, "llama" has pieces and scores; None is none."""
    if kind is None:
        return {}
    if kind == "gpt2":
        data = json.loads(small_tokenizer(vocab).to_str())
        ids, special = data["model"]["vocab"], {entry["content"] for entry in data["added_tokens"]}
        texts = sorted(ids, key=ids.__getitem__)
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        types = [3 if text in special else 1 for text in texts]
        found: dict[str, Any] = {"pre": "smollm", "merges": merges, "bos_token_id": 0, "eos_token_id": 0}
    else:
        text = calibration_text().replace(" ", "▁")
        letters = sorted(set(text) - {"\n"})[:100]
        pairs = sorted({a + b for a, b in pairwise(text) if {a, b} <= set(letters)})
        texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pairs][:vocab]
        types = [2, 3, 3, *[6] * 256, *[1] * (len(texts) - 259)]
        scores = [0.0 if index < 259 else -float(index - 259) for index in range(len(texts))]
        found = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    found |= {"model": kind, "tokens": texts, "token_type": types}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a config.json as the converter writes it, and what other tools write besides."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": int(head_dim * config.get("partial_rotary_factor", 1.0)),
    }
    if config["model_type"] in ("phi3", "gemma3_text"):
        found["attention.sliding_window"] = config["sliding_window"] or 0
    scaling = config.get("rope_scaling") or {}
    if "long_factor" in scaling:
        original = config["original_max_position_embeddings"]
        stretch = math.log(config["max_position_embeddings"] / original) / math.log(original)
        found["rope.scaling.attn_factor"] = math.sqrt(1 + stretch)
        found["rope.scaling.original_context_length"] = original
    if scaling.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
        if "original_max_position_embeddings" in scaling:
            found["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    for field, key in NUMBERS.items():
        if field in config:
            found[key] = float(config[field])
    return {f"{FAMILIES[config['model_type']][0]}.{key}": value for key, value in found.items()}


def llama3_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """rope_freqs.weight as the converter computes it, float32 [head_dim // 2]; None without llama3 scaling."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    dim, factors = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"], []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * config.get("rope_theta", 10000.0) ** (i / dim)
        smooth = (scaling["original_max_position_embeddings"] / wave - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        blended = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        factors.append(1.0 if wave < high else scaling["factor"] if wave > low else blended)
    return np.array(factors, np.float32)


def write_gguf(file: Path, folder: Path, types: Types = "F32", *, tokenizer: str | None = None, **fields: Any) -> Path:
    """Convert a Hugging Face folder to a GGUF file; `fields` are more metadata, with __ for a dot; None leaves out."""
    config = json.loads((folder / "config.json").read_text())
    architecture = FAMILIES[config["model_type"]][0]
    writer = gguf.GGUFWriter(file, architecture)
    metadata = {"general.name": folder.name, "general.license": "mit"} | config_fields(config)
    metadata |= tokenizer_fields(tokenizer, config["vocab_size"])
    for name, value in (metadata | {key.replace("__", "."): value for key, value in fields.items()}).items():
        if value is not None:
            kind = Value.UINT32 if type(value) is int else Value.FLOAT32 if type(value) is float else None
            writer.add_key_value(name, value, kind or Value.get_type(value))
    if (factors := llama3_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for kind in ("long", "short"):
        if (listed := (config.get("rope_scaling") or {}).get(f"{kind}_factor")) is not None:
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(listed, np.float32))
    with safe_open(folder / WEIGHTS, "numpy") as tensors:  # one after another: some are large
        for seed, name in enumerate(sorted(tensors.keys())):
            values, heads, called = tensors.get_tensor(name), heads_of(name, config), theirs(name, architecture)
            if architecture == "gemma3" and name.endswith("norm.weight"):
                values = values + 1
            kind = types if isinstance(types, str) else types(called)
            raw, type_ = encoded(permuted(values, heads) if heads else values, kind, seed)
            writer.add_tensor(called, raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_dequantized(file: Path, checkpoint: Path, folder: Path) -> Path:
    """The Hugging Face folder of what a GGUF file holds, as the gguf package decodes it: `checkpoint`'s otherwise."""
    shutil.copytree(checkpoint, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, values in load_file(folder / WEIGHTS).items():
        tensor = found[theirs(name, FAMILIES[config["model_type"]][0])]
        decoded = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(values.shape)
        heads = heads_of(name, config)
        tensors[name] = np.ascontiguousarray(unpermuted(decoded, heads) if heads else decoded, np.float32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@dataclass
class RawTensor:
    """dims: innermost first, as the file has them. offset: None lays the tensor after the one before."""

    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None


@dataclass
class Raw:
    """A GGUF file in pieces, from which files that no writer would write are put together.

    fields: name -> type and value as the file has them. tensors: name -> description and data. Both as lists of
    pairs, so that names can come twice.
    """

    fields: list[tuple[bytes, bytes]]
    tensors: list[tuple[bytes, RawTensor]]
    version: int = 3
    field_count: int | None = None
    tensor_count: int | None = None

    @classmethod
    def of(cls, file: Path) -> Raw:
        reader = gguf.GGUFReader(file)
        fields = [
            (field.name.encode(), b"".join(part.tobytes() for part in field.parts[2:]))
            for field in reader.fields.values()
            if not field.name.startswith("GGUF.")
        ]
        tensors = [
            (t.name.encode(), RawTensor([int(d) for d in t.shape], int(t.tensor_type), t.data.tobytes()))
            for t in reader.tensors
        ]
        return cls(fields, tensors)

    def without(self, name: str) -> Raw:
        """Without this field or tensor."""
        self.fields = [entry for entry in self.fields if entry[0] != name.encode()]
        self.tensors = [entry for entry in self.tensors if entry[0] != name.encode()]
        return self

    def put(self, name: str, kind: Value, value: Any) -> Raw:
        """With a field of this type and value: bytes as they are, or numbers in struct's form."""
        forms = {Value.UINT8: "<B", Value.UINT32: "<I", Value.INT32: "<i", Value.UINT64: "<Q", Value.FLOAT32: "<f"}
        forms |= {Value.BOOL: "<?", Value.INT64: "<q", Value.FLOAT64: "<d"}
        raw = struct.pack("<Q", len(value)) + value if kind == Value.STRING else value
        self.without(name)
        self.fields.append(
            (name.encode(), struct.pack("<I", kind) + (struct.pack(forms[kind], value) if kind in forms else raw))
        )
        return self

    def tensor(self, name: str) -> RawTensor:
        return dict(self.tensors)[name.encode()]

    def header(self) -> bytes:
        """All before the data, without padding."""
        counts = [
            len(part) if count is None else count
            for part, count in ((self.tensors, self.tensor_count), (self.fields, self.field_count))
        ]
        out = b"GGUF" + struct.pack("<IQQ", self.version, *counts)
        for name, value in self.fields:
            out += struct.pack("<Q", len(name)) + name + value
        at = 0
        for name, tensor in self.tensors:
            out += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.dims))
            out += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
            out += struct.pack("<IQ", tensor.type, at if tensor.offset is None else tensor.offset)
            at += -(-len(tensor.data) // 32) * 32
        return out

    def bytes(self) -> bytes:
        out = self.header()
        for data in [b"", *(tensor.data for _, tensor in self.tensors)]:
            out += data
            out += bytes(-len(out) % 32)
        return out
