"""Reading a Llama-architecture checkpoint: a local Hugging Face folder or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvq.runtime.bundle import Architecture
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

SHAPE_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
# RoPE variants whose frequencies do not depend on how long the text is.
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        name: folder name or hub id.
        folder: where its files are.
        config: as transformers reads it.
        model: weights in float32.
        inv_freq: rotary frequencies, float32 [head_dim // 2].
        rope_scale: factor on cosine and sine (yarn's attention scaling, else 1).
    """

    name: str
    folder: Path
    config: LlamaConfig
    model: LlamaForCausalLM
    inv_freq: np.ndarray
    rope_scale: float

    @property
    def architecture(self) -> Architecture:
        """Shape of the model."""
        c = self.config
        return Architecture(
            layers=c.num_hidden_layers,
            hidden=c.hidden_size,
            ffn=c.intermediate_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            vocab=c.vocab_size,
            context=c.max_position_embeddings,
        )

    def tensor(self, name: str) -> np.ndarray:
        """A parameter by its full name, as float32.

        Raises:
            CheckpointError: it holds NaN or infinity, which quantization would hide.
        """
        values = self.model.get_parameter(name).detach().numpy()
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} of {self.name} holds NaN or infinity; give a checkpoint with finite weights")
        return values

    def stacked(self, names: list[str]) -> np.ndarray | None:
        """Parameters concatenated along the first axis; None if the model has none of these names (biases)."""
        try:
            return np.concatenate([self.tensor(name) for name in names])
        except AttributeError:
            return None

    def tokenizer_json(self) -> str | None:
        """Content of tokenizer.json, converted from tokenizer.model if need be; None without either.

        Raises:
            CheckpointError: it cannot be read, or has ids beyond the model's vocabulary.
        """
        file, sentencepiece = self.folder / "tokenizer.json", self.folder / "tokenizer.model"
        try:
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                tokenizer = Tokenizer.from_str(text)
            elif sentencepiece.is_file():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True).backend_tokenizer
                text = tokenizer.to_str()
            else:
                return None
        except Exception as error:  # the Rust library raises plain Exception
            name = (file if file.is_file() else sentencepiece).name
            raise CheckpointError(
                f"{name} of {self.name} cannot be read ({_short(error)}); give a checkpoint with a valid tokenizer.json"
            ) from None
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= self.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.name} has id {largest}, the model {self.config.vocab_size} embeddings;"
                " give the tokenizer that belongs to it"
            )
        return text

    def chat_template(self) -> str | None:
        """The Jinja chat template, if the checkpoint has one."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = _json(self.folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens that a chat template may name, such as {"bos_token": "<s>"}."""
        found = _json(self.folder / "special_tokens_map.json") | _json(self.folder / "tokenizer_config.json")
        texts = {
            name: entry.get("content") if isinstance(entry, dict) else entry
            for name in SPECIAL_TOKENS
            if (entry := found.get(name)) is not None
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def eos_token_ids(self) -> list[int]:
        """Ids that end a text: of generation_config.json, else of config.json."""
        eos = _json(self.folder / "generation_config.json").get("eos_token_id", self.config.eos_token_id)
        ids = eos if isinstance(eos, list) else [eos]
        return [i for i in ids if i is not None and 0 <= i < self.config.vocab_size]


def load_checkpoint(reference: str) -> Checkpoint:
    """Read a checkpoint.

    Args:
        reference: a local folder, or a hub id such as ``HuggingFaceTB/SmolLM-135M``.

    Raises:
        CheckpointError: files missing or damaged, pickled weights, hub out of reach.
        UnsupportedArchitectureError: not a Llama architecture, or an unsupported variant of it.
    """
    folder = Path(reference) if Path(reference).is_dir() else _download(reference)
    name = folder.resolve().name if Path(reference).is_dir() else reference
    config = _config(folder, name)
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{name} holds its weights as a pickle ({pickled[0]}), which can run code when read;"
                " convert it to safetensors first"
            )
        raise CheckpointError(f"{name} has no .safetensors weights in {folder}; check that the download is complete")
    inv_freq, rope_scale = ROPE_INIT_FUNCTIONS[_rope_type(config)](config, torch.device("cpu"))
    return Checkpoint(name, folder, config, _weights(folder, name, config), inv_freq.numpy(), float(rope_scale))


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise CheckpointError(f"no checkpoint folder {reference}; give a Hugging Face folder or a hub id (owner/name)")
    try:
        return Path(snapshot_download(reference, allow_patterns=WANTED_FILES))
    except Exception as error:
        raise CheckpointError(
            f"{reference} is no local folder and cannot be fetched from the hub ({_short(error)});"
            " check the name and the connection, or give a local folder"
        ) from None


def _config(folder: Path, name: str) -> LlamaConfig:
    """Read and check config.json: everything a graph depends on is supported or refused by name."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} has no config.json in {folder}; give a Hugging Face checkpoint folder")
    raw = _json(folder / "config.json")
    kind = raw.get("model_type")
    if kind != "llama":
        raise UnsupportedArchitectureError(
            f"{name} is of model_type {kind!r}; kvq exports the Llama architecture (model_type 'llama') only"
        )
    for field in SHAPE_FIELDS:
        value = raw.get(field)
        if value is not None and (not isinstance(value, int) or value < 1):  # absent ones have defaults
            raise CheckpointError(f"config.json of {name} has {field}={value!r}; fix it: it must be a positive integer")
    try:
        config = LlamaConfig(**raw)
    except Exception as error:
        raise CheckpointError(
            f"config.json of {name} is not valid ({_short(error)}); fix it or download it again"
        ) from None
    for field, supported in (("hidden_act", "silu"), ("quantization_config", None), ("partial_rotary_factor", 1.0)):
        value = getattr(config, field, supported)
        if value != supported:
            raise UnsupportedArchitectureError(f"{name} has {field}={value!r}; kvq supports {supported!r} only")
    if _rope_type(config) not in ROPE_TYPES:
        raise UnsupportedArchitectureError(
            f"{name} scales its rotary embedding by {_rope_type(config)!r}; known: {', '.join(sorted(ROPE_TYPES))}"
        )
    if config.head_dim % 8 or config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedArchitectureError(
            f"{name} has head_dim {config.head_dim}, {config.num_attention_heads} heads and"
            f" {config.num_key_value_heads} KV heads; head_dim must be a multiple of 8, heads of KV heads"
        )
    return config


def _rope_type(config: LlamaConfig) -> str:
    scaling: dict[str, Any] = config.rope_scaling or {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def _weights(folder: Path, name: str, config: LlamaConfig) -> LlamaForCausalLM:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except Exception as error:
        raise CheckpointError(
            f"the weights of {name} cannot be read ({_short(error)}); check that the download is complete"
        ) from None
    if info["missing_keys"] or info["mismatched_keys"]:
        bad = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
        raise CheckpointError(
            f"{name} lacks {len(bad)} weights or has them in other shapes than config.json says, first {bad[0]};"
            " check that config.json and weights belong together"
        )
    return model.eval()


def _json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file.name} in {file.parent} is not valid JSON ({_short(error)}); fix it or download it again"
        ) from None
    return data if isinstance(data, dict) else {}


def _short(error: Exception) -> str:
    """First line of an error, as libraries write paragraphs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
