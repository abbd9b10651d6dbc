"""A checkpoint to export: the files of a model, and what its architecture makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvq.exporter.architectures import Model, describe
from kvq.exporter.sources import open_source
from kvq.exporter.sources.base import BlockForm, Blocks, Source
from kvq.runtime.bundle.manifest import Architecture
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
            CheckpointError: it holds NaN or infinity, which quantization would hide.
        """
        values, adapted = self._finite(name, self.source.read(name)), self.model.adapted.get(name)
        return values if adapted is None else adapted.of(values)

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

    def _blocks(self, name: str) -> Blocks | None:
        """A matrix as the architecture takes it, in blocks."""
        blocks, adapted = self.source.blocks(name), self.model.adapted.get(name)
        return blocks if blocks is None or adapted is None else adapted.of_blocks(blocks)

    def _finite(self, name: str, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} of {self.name} holds NaN or infinity; give a checkpoint with finite weights")
        return values

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
