"""A checkpoint to export: the files of a model, and what its architecture makes of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvq.exporter.architectures import Model, describe
from kvq.exporter.limits import MAGNITUDE, TEMPLATE_BYTES
from kvq.exporter.sources import open_source
from kvq.exporter.sources.base import BlockForm, Blocks, Source
from kvq.runtime.bundle.fields import encodable, text
from kvq.runtime.bundle.limits import END_IDS, TEXT
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.bundle.sampling import recommended
from kvq.runtime.catalog.registry import Shape, entry_of
from kvq.runtime.errors import CheckpointError, TokenizerError
from kvq.runtime.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, and the description of what its layers compute.

    Attributes:
        source: the files.
        model: the description.
    """

    source: Source
    model: Model

    @property
    def name(self) -> str:
        """What people call it."""
        return self.source.name

    @property
    def architecture(self) -> Architecture:
        """Shape of the model."""
        return self.model.shape

    def tensor(self, name: str) -> np.ndarray:
        """A parameter by its full name, as the architecture takes it, float32.

        Raises:
            CheckpointError: it holds NaN or infinity, which quantization would hide, or what single precision cannot
                calculate with.
        """
        values, adapted = self._finite(name, self.source.read(name)), self.model.adapted.get(name)
        if adapted is None:
            return values
        with np.errstate(over="ignore"):
            return self._finite(name, adapted.of(values))

    def stacked(self, names: list[str]) -> np.ndarray:
        """Parameters concatenated along the first axis."""
        return np.concatenate([self.tensor(name) for name in names])

    def stacked_blocks(self, names: list[str]) -> Blocks | None:
        """Matrices concatenated along the first axis, in blocks as the source holds them.

        None if it does not, or if some are of 4 bits with minima and others of 8 bits: no form holds both.
        """
        found = [self._blocks(name) for name in names]
        parts = [blocks for blocks in found if blocks is not None]
        if len(parts) < len(names):
            return None
        for name, blocks in zip(names, parts, strict=True):
            self._finite(name, blocks.scales)
            if blocks.minima is not None:
                self._finite(name, blocks.minima)
        forms = [part.form for part in parts]
        bits, minima = {form.bits for form in forms}, any(form.minima for form in forms)
        if minima and len(bits) > 1:
            return None
        form = BlockForm(max(bits), min(form.block for form in forms), minima)
        parts = [part.as_form(form) for part in parts]
        return Blocks(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            form.bits,
            form.block,
            np.concatenate([part.minima for part in parts if part.minima is not None]) if form.minima else None,
        )

    def steps(self, names: list[str], form: BlockForm) -> np.ndarray:
        """Scales float32 [n, k // form.block] of matrices concatenated; 0 for those that the source holds otherwise.

        Args:
            names: of matrices.
            form: bits and block; minima do not matter.
        """
        found = []
        for name in names:
            n, k = self.source.shapes[name]
            blocks = self._blocks(name)
            fits = blocks is not None and blocks.form[:2] == form[:2]
            found.append(blocks.scales if blocks is not None and fits else np.zeros((n, k // form.block), np.float32))
        return np.concatenate(found)

    def _blocks(self, name: str) -> Blocks | None:
        """A matrix as the architecture takes it, in blocks."""
        blocks, adapted = self.source.blocks(name), self.model.adapted.get(name)
        with np.errstate(over="ignore"):  # whoever asked looks at what came of it
            return blocks if blocks is None or adapted is None else adapted.of_blocks(blocks)

    def _finite(self, name: str, values: np.ndarray) -> np.ndarray:
        if not values.size or (values.min() >= -MAGNITUDE and values.max() <= MAGNITUDE):  # neither is true of NaN
            return values
        if np.isfinite(values).all():
            what = f"holds weights beyond {MAGNITUDE:g}, which single precision cannot calculate with"
            raise CheckpointError(f"{name} of {self.name} {what}; give a checkpoint of a trained model")
        raise CheckpointError(f"{name} of {self.name} holds NaN or infinity; give a checkpoint with finite weights")

    def tokenizer_json(self) -> str | None:
        """Content of tokenizer.json; None without a tokenizer.

        Raises:
            CheckpointError: it cannot be read, or has ids beyond the model's vocabulary.
        """
        text = self.source.tokenizer_json()
        if text is None:
            return None
        try:
            tokenizer = load_tokenizer(text)
        except TokenizerError as error:
            raise CheckpointError(
                f"tokenizer.json of {self.name} cannot be read ({error}); give a checkpoint with a valid one"
            ) from None
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= self.architecture.vocab:
            raise CheckpointError(
                f"the tokenizer of {self.name} has id {largest}, the model {self.architecture.vocab} embeddings;"
                " give the tokenizer that belongs to it"
            )
        return text

    def chat_template(self) -> str | None:
        """The Jinja chat template, if there is one.

        Raises:
            CheckpointError: it cannot be read, or no file could hold it.
        """
        template = self.source.chat_template()
        if template is not None and (len(template) > TEMPLATE_BYTES or not encodable(template)):
            raise CheckpointError(
                f"the chat template of {self.name} is longer than {TEMPLATE_BYTES} characters, or no Unicode text; fix"
                " it or download it again"
            )
        return template

    def said(self, name: str | None = None) -> dict[str, Any]:
        """What a manifest keeps of it besides its shape, by the names of `Manifest`.

        Args:
            name: that the model is to have; None is its own. Where the source recommends no way of drawing, the
                registry may know one for a model of that name.

        Raises:
            CheckpointError: no reader of bundles would take it.
            BundleError: the registry cannot be read.
        """
        source = self.source
        said: dict[str, Any] = {"eos_token_ids": source.eos_token_ids(), "special_tokens": source.special_tokens()}
        try:
            if len(set(said["eos_token_ids"])) > END_IDS:
                raise ValueError(f"more than {END_IDS} ids that end a text")
            for special, token in said["special_tokens"].items():
                text(token, special, TEXT, printable=False)
            text(source.licence or "", "its licence", sys.maxsize, printable=False)
            said["sampling"] = recommended(source.sampling(), "its recommended sampling")
        except ValueError as error:
            raise CheckpointError(f"{self.name} cannot be exported ({error}); fix it or download it again") from None
        if not said["sampling"] and (entry := entry_of(name or self.name, self._size)):
            said["sampling"] = dict(entry.sampling)
        return said | {"eos_token_ids": list(dict.fromkeys(said["eos_token_ids"]))}

    @property
    def _size(self) -> Shape:
        """What the registry knows of a shape."""
        shape = self.architecture
        return Shape(shape.layers, shape.hidden, shape.vocab)


def load_checkpoint(reference: str | Path, context: int | None = None) -> Checkpoint:
    """Open a checkpoint; parameters are read when they are asked for.

    Args:
        reference: a Hugging Face folder, a .gguf file, or a hub id such as ``HuggingFaceTB/SmolLM-135M``.
        context: tokens of the longest text that is wanted; None is what the model has, or the shortest of several
            contexts that it has rotary factors for.

    Raises:
        CheckpointError: files missing or damaged, pickled weights, hub out of reach, or a longer context than there is.
        UnsupportedArchitectureError: an architecture or a variant of one that kvq does not implement.
    """
    source = open_source(str(reference))
    source.context = context
    return Checkpoint(source, describe(source))
