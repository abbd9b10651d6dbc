"""A Hugging Face checkpoint folder: config.json, safetensors, tokenizer files. Pickles are never opened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 # numpy gets a bfloat16, which safetensors looks for
import numpy as np
from safetensors import safe_open

from kvq.exporter import limits
from kvq.exporter.sources.base import SPECIAL_TOKENS, Source, short
from kvq.exporter.sources.files import check_safetensors, is_there, read_bytes, read_json, read_text
from kvq.exporter.sources.text_part import own_names, text_config
from kvq.runtime.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Of a repository: what is read here, and nothing that could hold a pickle.
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
FLOATS = {"F64", "F32", "F16", "BF16"}


class HuggingFaceFolder(Source):
    """A checkpoint folder.

    Args:
        path: the folder.
        name: what people call it.

    Raises:
        CheckpointError: files missing or damaged, or pickled weights.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        if not is_there(path / CONFIG):
            raise CheckpointError(f"{name} has no config.json in {path}; give a Hugging Face checkpoint folder")
        self.config = read_json(path / CONFIG)
        self._files = self._weight_files()
        self._nbytes = 0
        places: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file in self._files:
            self._nbytes += check_safetensors(file)  # before anything is made of it, and of no pipe
            try:
                with safe_open(file, "np") as opened:
                    for tensor in opened.keys():  # noqa: SIM118 # no mapping
                        part = opened.get_slice(tensor)
                        if part.get_dtype() in FLOATS:
                            places[tensor] = (file, tensor, tuple(part.get_shape()))
            except Exception as error:  # the Rust library's errors share no base class
                raise self._unreadable(error) from None
            if len(places) > limits.TENSORS:
                raise CheckpointError(
                    f"{name} has more than {limits.TENSORS} tensors, more than any model; give the weights of one"
                )
        text = text_config(self.config, name)
        if text is not None:
            self.config, places = text, own_names(places)
        self._places = places

    def _unreadable(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"the weights of {self.name} cannot be read ({short(error)}); check that the download is complete"
        )

    def _weight_files(self) -> list[Path]:
        """The safetensors files: those of the index, else the one, else all there are."""
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) > limits.WEIGHT_FILES:
            raise CheckpointError(f"{self.name} has {len(found)} files of weights; give the folder of a single model")
        if is_there(self.path / INDEX) and not is_there(self.path / WEIGHTS):
            listed = read_json(self.path / INDEX).get("weight_map")
            names = sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else []
            missing = [name for name in names if self.path / name not in found]
            if not names or missing:
                raise CheckpointError(
                    f"the weights of {self.name} cannot be read ({missing[0] if missing else 'an index of nothing'} is"
                    " not there); check that the download is complete"
                )
            return [self.path / name for name in names]
        if found:
            return [self.path / WEIGHTS] if self.path / WEIGHTS in found else found
        pickled = sorted(f.name for pattern in PICKLES for f in self.path.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self.name} holds its weights as a pickle ({pickled[0]}), which can run code when read;"
                " convert it to safetensors first"
            )
        raise CheckpointError(
            f"{self.name} has no .safetensors weights in {self.path}; check that the download is complete"
        )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        try:
            file, stored, _ = self._places[name]
            with safe_open(file, "np") as opened:
                values = opened.get_tensor(stored)
            with np.errstate(over="ignore"):  # of 64 bits; whoever reads refuses what is infinite
                return np.ascontiguousarray(values, np.float32)
        except Exception as error:
            raise self._unreadable(error) from None

    def tokenizer_json(self) -> str | None:
        from kvq.exporter.sources import tokenizers
        from kvq.exporter.sources.resolved import resolved

        if is_there(file := self.path / "tokenizer.json"):
            settings = read_json(self.path / "tokenizer_config.json")
            text = read_text(file, limits.TOKENIZER_BYTES)
            return resolved(text, settings, self.special_tokens(), self.name)
        if is_there(file := self.path / "tokenizer.model"):
            settings = read_json(self.path / "tokenizer_config.json")
            return tokenizers.from_sentencepiece(
                read_bytes(file, limits.SENTENCEPIECE_BYTES),
                f"{file.name} of {self.name}",
                add_bos=settings.get("add_bos_token", True) is True,
                add_eos=settings.get("add_eos_token", False) is True,
            )
        if is_there(file := self.path / "vocab.json") and is_there(self.path / "merges.txt"):
            return tokenizers.from_vocab_and_merges(
                read_text(file, limits.TOKENIZER_BYTES),
                read_text(self.path / "merges.txt", limits.TOKENIZER_BYTES),
                f"{file.name} of {self.name}",
                special=sorted(set(self.special_tokens().values())),
            )
        return None

    def chat_template(self) -> str | None:
        file = self.path / "chat_template.jinja"
        if is_there(file):
            return read_text(file, limits.TEMPLATE_BYTES)
        template = read_json(self.path / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [
                entry.get("template")
                for entry in template
                if isinstance(entry, dict) and entry.get("name") == "default"
            ]
            template = named[-1] if named else None
        return template if isinstance(template, str) else None

    def special_tokens(self) -> dict[str, str]:
        found = read_json(self.path / "special_tokens_map.json") | read_json(self.path / "tokenizer_config.json")
        texts = {
            name: entry.get("content") if isinstance(entry, dict) else entry
            for name in SPECIAL_TOKENS
            if (entry := found.get(name)) is not None
        }
        return {name: text for name, text in texts.items() if isinstance(text, str) and len(text) <= limits.TEXT}

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def eos_token_ids(self) -> list[int]:
        """Ids of generation_config.json, else of config.json."""
        eos = self._generation.get("eos_token_id", self.config.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [eos]
        vocab = self.config.get("vocab_size", 0)
        return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab]

    @cached_property
    def _generation(self) -> dict[str, Any]:
        return read_json(self.path / "generation_config.json")

    def sampling(self) -> Mapping[str, Any]:
        """Of generation_config.json, unless it says that nothing is to be drawn: its numbers are idle then."""
        return {} if self._generation.get("do_sample") is False else self._generation

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256()
        for file in [self.path / CONFIG, *self._files]:
            with open(file, "rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        return found.hexdigest()

    @property
    def licence(self) -> str | None:
        found = self.config.get("license")
        return found if isinstance(found, str) else None

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"format": "safetensors"}


def snapshot(reference: str) -> Path:
    """Folder of a hub id's checkpoint, fetched if need be.

    Raises:
        CheckpointError: no hub id, or the hub cannot be reached.
    """
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint folder {reference}; give a Hugging Face folder, a .gguf file or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=WANTED))
    except Exception as error:  # its errors share no base class, and requests' come through
        raise CheckpointError(
            f"{reference} is no local folder and cannot be fetched from the hub ({short(error)});"
            " check the name and the connection, or give a local folder"
        ) from None
