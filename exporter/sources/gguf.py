"""A GGUF file, as llama.cpp's converter writes it, of a family whose description says how."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from kvq.exporter import limits
from kvq.exporter.architectures import ARCHITECTURES, what_is_missing
from kvq.exporter.sources.base import (
    SPECIAL_TOKENS,
    BlockForm,
    Blocks,
    Source,
    positive,
    positive_number,
    short,
)
from kvq.exporter.sources.gguf_blocks import EXACT, decoded_blocks
from kvq.exporter.sources.gguf_header import Tensor, read_header
from kvq.exporter.sources.gguf_rope import FACTORS, rope_fields
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")
FLOATS = {Type.F32, Type.F16, Type.BF16}
TYPES = FLOATS | {
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0,
    Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
}  # fmt: skip
# Option of `Source.sampling` -> its key below general.sampling, where converters write generation_config.json.
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "penalty_repeat"}  # fmt: skip
SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
# Configuration: key after the architecture's name -> (field of config.json, type, whether it must be there).
CONFIG = {
    "block_count": ("num_hidden_layers", int, True),
    "embedding_length": ("hidden_size", int, True),
    "feed_forward_length": ("intermediate_size", int, True),
    "attention.head_count": ("num_attention_heads", int, True),
    "attention.head_count_kv": ("num_key_value_heads", int, False),
    "attention.key_length": ("head_dim", int, False),
    "context_length": ("max_position_embeddings", int, True),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float, True),
    "rope.freq_base": ("rope_theta", float, False),
}


class GgufFile(Source):
    """One GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: unreadable, damaged, part of a split model, or lacking what its model needs.
        UnsupportedArchitectureError: of an architecture, or with tensors of a type, that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.fields, tensors = read_header(path)
        self._nbytes = path.stat().st_size
        if SPLIT.search(path.stem) or self.fields.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{path.name} is one part of a split model; give a single file: llama-gguf-split --merge makes one"
            )
        architecture = self.fields.get("general.architecture")
        known = {f.gguf.architecture: (kind, f.gguf) for kind, f in ARCHITECTURES.items() if f.gguf is not None}
        if not isinstance(architecture, str) or architecture not in known:
            raise UnsupportedArchitectureError(
                f"{path.name} is of architecture {architecture!r:.60}{what_is_missing(str(architecture))}; kvq exports"
                f" these only: {', '.join(sorted(known))}"
            )
        self._model_type, self._dialect = known[architecture]
        self._tensors: dict[str, Tensor] = {}
        for theirs, tensor in tensors.items():
            if theirs in FACTORS:
                continue
            self._tensors[self._renamed(theirs)] = tensor
            if tensor.type not in TYPES:
                types = ", ".join(sorted(t.name for t in TYPES))
                raise UnsupportedArchitectureError(
                    f"{path.name} stores {theirs!r:.60} as {tensor.type.name}; known: {types}"
                )
        self._factors = {name: self._floats(tensors[name], name) for name in FACTORS if name in tensors}
        self.config = self._config()

    def _renamed(self, theirs: str) -> str:
        """Hugging Face's name of a tensor."""
        dialect = self._dialect
        if layer := IN_LAYER.fullmatch(theirs):
            number, kind, part = layer.groups()
            if kind in dialect.layer:
                return f"model.layers.{int(number)}.{dialect.layer[kind]}.{part}"
        stem, _, part = theirs.rpartition(".")
        if stem in dialect.whole and part in ("weight", "bias"):
            return f"{dialect.whole[stem]}.{part}"
        raise UnsupportedArchitectureError(
            f"{self.path.name} has a tensor {theirs!r:.60}, which a model of the architecture {dialect.architecture}"
            " does not; kvq exports models of its tensors only"
        )

    def _key(self, key: str) -> str:
        """A key of the architecture's own."""
        return f"{self._dialect.architecture}.{key}"

    def _field(self, key: str, default: Any = None) -> Any:
        """The value of such a key."""
        return self.fields.get(self._key(key), default)

    def _config(self) -> dict[str, Any]:
        """The fields of config.json."""
        config: dict[str, Any] = {"model_type": self._model_type, **self._dialect.config}
        for key, (field, kind, needed) in CONFIG.items():
            value = self._field(key)
            if value is None and not needed:
                continue
            if value is None:
                raise CheckpointError(
                    f"{self.path.name} lacks {self._key(key)}; download it again, or convert it again"
                )
            what = f"{self.path.name} has {self._key(key)}"
            config[field] = positive(value, what) if kind is int else positive_number(value, what)
        for key, field in self._dialect.numbers.items():
            if (value := self._field(key)) is not None:
                config[field] = positive_number(value, f"{self.path.name} has {self._key(key)}")
        layers = config["num_hidden_layers"]
        surplus = [name for name in self._tensors if name.startswith("model.layers.") and _layer(name) >= layers]
        if surplus:
            raise CheckpointError(
                f"{self.path.name} has {surplus[0]}, but {layers} layers by {self._key('block_count')}; download it"
                " again"
            )
        for field, part in (("attention_bias", ".self_attn."), ("mlp_bias", ".mlp.")):
            config[field] = any(part in name and name.endswith(".bias") for name in self._tensors)
        for key in ("expert_count", "expert_used_count"):
            if self._field(key):
                raise UnsupportedArchitectureError(f"{self.path.name} is a mixture of experts; kvq supports one only")
        if self._field("attention.causal") is False:
            raise UnsupportedArchitectureError(
                f"{self.path.name} has {self._key('attention.causal')}=False; kvq supports models that look back only"
            )
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"{self.path.name} has no matrix token_embd.weight; check that the download is complete"
            )
        config["vocab_size"] = embedding.shape[0]
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        heads = config["num_attention_heads"]
        config.setdefault("num_key_value_heads", heads)
        head_dim = config.setdefault("head_dim", config["hidden_size"] // heads)
        positive(head_dim, f"{self.path.name} has {heads} heads for {config['hidden_size']} features, head_dim")
        if self._field("attention.value_length", head_dim) != head_dim:
            raise UnsupportedArchitectureError(
                f"{self.path.name} has keys and values of other sizes; kvq supports equal ones"
            )
        rotated = self._field("rope.dimension_count", head_dim)
        if rotated != head_dim and self._dialect.rotates_parts:
            config["partial_rotary_factor"] = positive(rotated, f"{self.path.name} has rope.dimension_count") / head_dim
        elif rotated != head_dim:
            raise UnsupportedArchitectureError(
                f"{self.path.name} rotates only part of a head; kvq supports rotary embedding of the whole head only"
            )
        context = config["max_position_embeddings"]
        return config | self._windows() | rope_fields(self._field, self._factors, rotated, context, self.path)

    def _windows(self) -> dict[str, Any]:
        """The fields of config.json that say which layers see the last tokens only, and how many."""
        found: dict[str, Any] = {}
        if window := self._field("attention.sliding_window"):  # 0 is none
            found["sliding_window"] = positive(window, f"{self.path.name} has {self._key('attention.sliding_window')}")
        kinds = self._field("attention.sliding_window_pattern")
        if isinstance(kinds, list):
            found["layer_types"] = ["sliding_attention" if kind else "full_attention" for kind in kinds]
        elif kinds is not None:
            found["sliding_window_pattern"] = kinds
        return found

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        values = self._decoded(tensor, name)
        order = self._row_order(name, len(values))
        return values if order is None else values[order]

    def _raw(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a tensor, uint8 [bytes]."""
        with open(self.path, "rb") as file:
            file.seek(tensor.offset)
            return np.frombuffer(file.read(tensor.nbytes), np.uint8)

    def _decoded(self, tensor: Tensor, name: str) -> np.ndarray:
        try:
            raw = self._raw(tensor)
            if tensor.type in FLOATS - {Type.BF16}:
                values = raw.view("<f4" if tensor.type is Type.F32 else "<f2").astype(np.float32)
            else:
                with np.errstate(all="ignore"):  # a scale that is no number is refused below, by whoever reads
                    values = dequantize(raw.reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1), tensor.type)
            return np.ascontiguousarray(values, np.float32).reshape(tensor.shape)
        except (OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"{name} of {self.path.name} cannot be read ({short(error)}); download the file again"
            ) from None

    def _floats(self, tensor: Tensor, name: str) -> np.ndarray:
        """A list that is no parameter, float32 [n]."""
        if tensor.type not in FLOATS or len(tensor.shape) != 1:
            raise CheckpointError(
                f"{name} of {self.path.name} has the shape {tensor.shape} and the type {tensor.type.name}, and is no"
                " list of floats; download the file again"
            )
        return self._decoded(tensor, name)

    def block_form(self, name: str) -> BlockForm | None:
        tensor = self._tensors[name]
        return EXACT.get(tensor.type) if len(tensor.shape) == 2 else None

    def blocks(self, name: str) -> Blocks | None:
        if self.block_form(name) is None:
            return None
        tensor = self._tensors[name]
        found = decoded_blocks(self._raw(tensor), tensor.type, self._decoded(tensor, name))
        order = self._row_order(name, tensor.shape[0])
        return found if found is None or order is None else found.rows(order)

    def _row_order(self, name: str, rows: int) -> np.ndarray | None:
        """Where rows of queries and keys stand: GGUF interleaves the halves of a head for its rotary embedding."""
        heads = self._dialect.interleaved.get(name.split(".")[-2])
        if heads is None:
            return None
        count = self.config.get(heads) or self.config["num_attention_heads"]
        if rows % (2 * count):
            raise CheckpointError(
                f"{name} of {self.path.name} has {rows} rows for {count} heads; check that the download is complete"
            )
        return np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).ravel()

    def tokenizer_json(self) -> str | None:
        if self.fields.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":  # llama.cpp's name of none
            return None
        from kvq.exporter.sources.tokenizers import from_gguf

        return from_gguf(self.fields, self.path.name)

    def chat_template(self) -> str | None:
        template = self.fields.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template.strip() else None

    def special_tokens(self) -> dict[str, str]:
        tokens = self.fields.get("tokenizer.ggml.tokens")
        found = {}
        for name, key in zip(SPECIAL_TOKENS, ("bos", "eos", "unknown", "padding"), strict=True):
            index = self.fields.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(tokens, list) and type(index) is int and 0 <= index < len(tokens):
                found[name] = str(tokens[index])
        return {name: text for name, text in found.items() if len(text) <= limits.TEXT}

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def eos_token_ids(self) -> list[int]:
        ids = [self.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        return sorted({i for i in ids if type(i) is int and 0 <= i < self.config["vocab_size"]})

    def sampling(self) -> Mapping[str, Any]:
        found = {name: self.fields.get(f"general.sampling.{key}") for name, key in SAMPLING.items()}
        # Floats of 32 bits: 0.95 is meant where 0.949999988 stands.
        return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in found.items()}

    @cached_property
    def digest(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def licence(self) -> str | None:
        found = self.fields.get("general.license")
        return found if isinstance(found, str) else None

    def describe(self) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for tensor in self._tensors.values():
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        return super().describe() | {"format": "gguf", "types": counts}


def _layer(name: str) -> int:
    """Number of the layer that a parameter belongs to."""
    return int(name.split(".")[2])
