"""The header of a GGUF file: metadata, and where tensors lie. Nothing of it is believed before it has been checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's own reader
takes a length beyond the end of a file for an array of so many empty elements and does not come
back; here every count and offset is compared with what the file has left.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kvq.exporter import limits
from kvq.runtime.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# Number types of metadata values by their number in the format.
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
MOST_DIMS, MOST_NAME, ALIGNMENT = 4, 1 << 16, 32


class Tensor(NamedTuple):
    """Where a tensor lies.

    shape: outermost dimension first, as numpy has it.
    type: how its values are stored.
    offset, nbytes: in the file.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


class Header(NamedTuple):
    """fields: name -> number, text, bool, or list of these. tensors: name -> place."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: no GGUF file, one of another version or byte order, cut short, or one whose counts, types
            or offsets do not fit its size.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for somebody to write
        raise CheckpointError(f"{path} is no file; give a .gguf file")
    try:
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path.name} is no GGUF file: it does not begin with GGUF; check the download")
            return _Walk(file, os.fstat(file.fileno()).st_size, path.name).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}); check the path") from None


class _Walk:
    """Goes through the bytes of a header once."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name, self.at, self.elements = file, size, name, 4, 0

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.name} is damaged: {why}; download it again")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.size - self.at:
            raise self.refuse(f"it ends inside its header, at byte {self.size}")
        self.at += count
        if self.at > limits.GGUF_HEADER_BYTES:
            raise self.refuse(f"a header of more than {limits.GGUF_HEADER_BYTES} bytes")
        data = self.file.read(count)
        if len(data) < count:
            raise self.refuse("it became shorter while it was read")
        return data

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int | None = None) -> str:
        length = self.number("<Q")
        if most is not None and length > most:
            raise self.refuse(f"a name of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.refuse("a text that is not UTF-8") from None

    def header(self) -> Header:
        version = self.number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "written for big-endian machines" if swapped else f"of GGUF version {version}"
            raise CheckpointError(f"{self.name} is {what}; give a little-endian file of version 2 or 3")
        tensor_count, field_count = self.number("<Q"), self.number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(self.counted(field_count, 13, "fields")):
            name = self.text(MOST_NAME)
            if name in fields:
                raise self.refuse(f"two fields {name!r:.60}")
            fields[name] = self.value(self.number("<I"), name)
        places = {}
        for _ in range(self.counted(tensor_count, 24, "tensors")):
            name = self.text(MOST_NAME)
            if name in places:
                raise self.refuse(f"two tensors {name!r:.60}")
            places[name] = self.place(name)
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self.refuse(f"an alignment of {alignment!r:.30}")
        start = -(-self.at // alignment) * alignment
        return Header(fields, self.checked(places, start, alignment))

    def counted(self, count: int, least: int, what: str, most: int = limits.GGUF_ENTRIES) -> int:
        """A count of entries that take at least so many bytes each."""
        if count * least > self.size - self.at:
            raise self.refuse(f"{count} {what} do not fit into what is left of it")
        if count > most:
            raise self.refuse(f"{count} {what}, more than {most}")
        return count

    def array(self, count: int, least: int, most: int) -> int:
        """The count of elements of an array."""
        self.elements += self.counted(count, least, "array elements", min(most, limits.GGUF_ELEMENTS - self.elements))
        return count

    def value(self, kind: int, name: str) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        if kind != ARRAY:
            raise self.refuse(f"a value of type {kind}")
        of, count = self.number("<I"), self.number("<Q")
        if of in SCALARS:
            kind_of = np.dtype(SCALARS[of])
            self.array(count, kind_of.itemsize, limits.ARRAYS.get(name, limits.OTHER_NUMBERS))
            return np.frombuffer(self.take(count * kind_of.itemsize), kind_of).tolist()
        if of != STRING:
            raise self.refuse(f"an array, and in it a value of type {of}")
        return [self.text() for _ in range(self.array(count, 8, limits.ARRAYS.get(name, limits.OTHER_TEXTS)))]

    def place(self, name: str) -> Tensor:
        dims = self.number("<I")
        if not 1 <= dims <= MOST_DIMS:
            raise self.refuse(f"{name!r:.60} has {dims} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dims)]))
        kind, offset = self.number("<I"), self.number("<Q")
        try:
            type_ = GGMLQuantizationType(kind)
            block, nbytes = GGML_QUANT_SIZES[type_]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{self.name} stores {name!r:.60} as type {kind}, which the installed gguf package does not know;"
                " use a file of another quantization, or update gguf"
            ) from None
        if not all(shape) or shape[-1] % block:
            raise self.refuse(f"{name!r:.60} has the shape {shape}, in blocks of {block}")
        return Tensor(shape, type_, offset, math.prod(shape) // block * nbytes)

    def checked(self, places: dict[str, Tensor], start: int, alignment: int) -> dict[str, Tensor]:
        """Tensors with offsets in the file: whole, aligned, and apart from each other."""
        found = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in places.items()}
        end, before = start, "header"
        for name, tensor in sorted(found.items(), key=lambda item: item[1].offset):
            if tensor.offset % alignment or tensor.offset < end:
                raise self.refuse(f"{name!r:.60} lies at {tensor.offset}, inside {before!r:.60} or not aligned")
            end, before = tensor.offset + tensor.nbytes, name
            if end > self.size:
                raise self.refuse(f"{name!r:.60} ends at byte {end}, the file at {self.size}: it is cut short")
        return found
