"""What the exporter reads from: names -> arrays, a configuration, a tokenizer; and blocks as a file holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvq.exporter import limits
from kvq.runtime.bundle.limits import NAME
from kvq.runtime.errors import CheckpointError

# Names that a chat template may use, as Hugging Face calls them.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class BlockForm(NamedTuple):
    """How a file holds a matrix in blocks.

    bits: of a code, 4 or 8.
    block: elements a scale.
    minima: whether a block has a minimum; of 4 bits only.
    """

    bits: int
    block: int
    minima: bool = False


@dataclass(frozen=True)
class Blocks:
    """A matrix [n, k] in blocks along k that its file holds in a form that is multiplied as it is.

    weight = (code - 2^(bits - 1)) * scale, exactly; of blocks with minima code * scale + minimum.

    Attributes:
        codes: uint8 [n, k], each below 2^bits.
        scales: float32 [n, k // block].
        bits: 4 or 8; 4 where there are minima.
        block: elements a scale.
        minima: float32 [n, k // block]; None where there are none.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block: int
    minima: np.ndarray | None = None

    @property
    def form(self) -> BlockForm:
        """How they are held."""
        return BlockForm(self.bits, self.block, self.minima is not None)

    @property
    def middle(self) -> int:
        """The code of zero where there are no minima."""
        return 1 << (self.bits - 1)

    def dequantize(self) -> np.ndarray:
        """The matrix, float32 [n, k]."""
        codes = self.codes.reshape(*self.scales.shape, self.block).astype(np.float32)
        if self.minima is None:
            weights = (codes - np.float32(self.middle)) * self.scales[..., None]
        else:
            weights = codes * self.scales[..., None] + self.minima[..., None]
        return weights.reshape(self.codes.shape)

    def rows(self, order: np.ndarray) -> Blocks:
        """The same rows in another order, int [n]."""
        minima = None if self.minima is None else self.minima[order]
        return replace(self, codes=self.codes[order], scales=self.scales[order], minima=minima)

    def times(self, factor: float) -> Blocks:
        """The same weights times a factor."""
        minima = None if self.minima is None else self.minima * np.float32(factor)
        return replace(self, scales=self.scales * np.float32(factor), minima=minima)

    def as_form(self, form: BlockForm) -> Blocks:
        """The same weights in codes of no fewer bits, blocks that divide the present ones, and minima if asked for.

        Raises:
            ValueError: minima in codes of more bits, or that the form leaves out.
        """
        if (self.minima is not None or form.minima) and (form.bits != self.bits or not form.minima):
            raise ValueError("minima stay, in codes of as many bits")
        codes, minima = self.codes, self.minima
        if form.bits != self.bits:
            codes = codes + np.uint8((1 << (form.bits - 1)) - self.middle)
        if form.minima and minima is None:
            minima = np.float32(-self.middle) * self.scales
        times = self.block // form.block
        minima = None if minima is None else np.repeat(minima, times, axis=1)
        return Blocks(codes, np.repeat(self.scales, times, axis=1), form.bits, form.block, minima)


class Source(ABC):
    """A model's files. Parameters have Hugging Face's names, whatever the files call them.

    Attributes:
        name: what people call it: folder or file name, or hub id.
        path: where it is.
        config: fields of Hugging Face's config.json, whatever the files call them.
        context: tokens of the longest text that is wanted; None leaves it to the architecture.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    context: int | None = None

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every parameter there is."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A parameter of `shapes`, decoded to float32.

        Raises:
            CheckpointError: its data cannot be read.
        """

    def block_form(self, name: str) -> BlockForm | None:
        """Form of `blocks(name)`, without reading them; None where there are no such blocks."""
        return None

    def blocks(self, name: str) -> Blocks | None:
        """A parameter as the file holds it, if that is a form that is multiplied as it is; else None."""
        return None

    @abstractmethod
    def tokenizer_json(self) -> str | None:
        """Text of a tokenizer.json; None if there is no tokenizer.

        Raises:
            CheckpointError: it cannot be read, or is of a kind that is not known.
        """

    @abstractmethod
    def chat_template(self) -> str | None:
        """The Jinja chat template, if there is one."""

    @abstractmethod
    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens that a chat template may name, such as {"bos_token": "<s>"}."""

    @abstractmethod
    def eos_token_ids(self) -> list[int]:
        """Ids that end a text; those outside the vocabulary are left out."""

    def sampling(self) -> Mapping[str, Any]:
        """Options of drawing that its makers recommend, by the names of `kvq.runtime.bundle.sampling`, not checked."""
        return {}

    @cached_property
    @abstractmethod
    def digest(self) -> str:
        """sha256, hexadecimal, of what the weights depend on."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is digested, where files are known: a source may leave it at 0."""
        return 0

    @property
    def licence(self) -> str | None:
        """The licence that the files name."""
        return None

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of it: JSON values."""
        licence = self.licence
        return {"name": shown(self.name), "sha256": self.digest, "licence": licence and licence[: limits.TEXT]}


def shown(name: str) -> str:
    """A name as a manifest may hold it: files are called anything."""
    return "".join(c if c.isprintable() and not "\ud800" <= c <= "\udfff" else "?" for c in name)[:NAME]


def short(error: BaseException) -> str:
    """First line of an error, as libraries write paragraphs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def positive(value: Any, what: str) -> int:
    """A positive integer of 31 bits from a file.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise CheckpointError(f"{what}={value!r:.60}; fix it: it must be a positive integer below 2^31")
    return value


def positive_number(value: Any, what: str) -> float:
    """A positive number from a file.

    Raises:
        CheckpointError: it is none, or larger than any that has a meaning.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CheckpointError(f"{what}={value!r:.60}; fix it: it must be a positive number below 1e12")
    return value
