"""Files of a stranger's checkpoint: regular ones alone, none larger than it may be, JSON of few values.

Reading a pipe waits for somebody to write, reading a device never ends, and a file with holes in it is as long as it
likes.
"""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path
from typing import Any

from kvq.exporter import limits
from kvq.exporter.sources.base import short
from kvq.runtime.errors import CheckpointError
from kvq.runtime.files import read_regular


def size_of(file: Path) -> int | None:
    """Bytes of a file of a checkpoint; None where it has no such file.

    Raises:
        CheckpointError: the name is there, and is no regular file's.
    """
    try:
        found = file.stat()  # follows links: the hub's cache is made of them
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not file.is_symlink():
            return None
        raise _unreadable(file, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file.name} in {file.parent} is no regular file; give a checkpoint of plain files")
    return found.st_size


def is_there(file: Path) -> bool:
    """Whether a checkpoint has a file; raises as `size_of`."""
    return size_of(file) is not None


def read_bytes(file: Path, most: int) -> bytes:
    """The content of a file that is there.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or larger than `most` bytes.
    """
    size = size_of(file) or 0
    try:
        data = b"" if size > most else read_regular(file, most + 1, follow=True)
    except OSError as error:
        raise _unreadable(file, error) from None
    if max(size, len(data)) > most:
        raise CheckpointError(f"{file.name} in {file.parent} has more than {most} bytes; give that of a model")
    return data


def read_text(file: Path, most: int) -> str:
    """The same as text, whose lines end as Python's do."""
    try:
        text = read_bytes(file, most).decode()
    except UnicodeDecodeError as error:
        raise _unreadable(file, error) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file.

    Raises:
        CheckpointError: it is not valid JSON, or of more values or values in values than any model's.
    """
    if not is_there(file):
        return {}
    text, what = read_text(file, limits.JSON_BYTES), f"{file.name} in {file.parent}"
    check_values(text, limits.JSON_VALUES, what)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({short(error)}); fix it or download it again") from None
    if is_deep(data):
        raise CheckpointError(f"{what} has values in values {limits.DEPTH} deep; fix it or download it again")
    return data if isinstance(data, dict) else {}


def check_values(text: str | bytes, most: int, what: str) -> None:
    """Compare how many values a JSON text can have at most with a bound, before any is made.

    Raises:
        CheckpointError: too many.
    """
    marks: Any = (b"{", b"[", b",") if isinstance(text, bytes) else ("{", "[", ",")
    if (count := sum(map(text.count, marks))) > most:
        raise CheckpointError(f"{what} has {count} values, more than {most}; give that of a model")


def is_deep(value: Any) -> bool:
    """Whether values of a JSON value are in more than `limits.DEPTH` others; found without going down."""
    level = [value]
    for _ in range(limits.DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for values in inner for each in values]
        if not level:
            return False
    return True


def check_safetensors(file: Path) -> int:
    """Bytes of a safetensors file, whose header is no larger than any model's.

    Raises:
        CheckpointError: it is, or of more tensors, or no regular file.
    """
    size, what = size_of(file), f"the header of {file.name} in {file.parent}"
    try:
        with open(file, "rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length > limits.HEADER_BYTES:
                raise CheckpointError(
                    f"{what} has {length} bytes, more than {limits.HEADER_BYTES}; download the file again"
                )
            header = opened.read(length)
    except OSError as error:
        raise _unreadable(file, error) from None
    if (count := header.count(b"{")) > limits.TENSORS:
        raise CheckpointError(f"{what} has {count} tensors, more than {limits.TENSORS}; give the weights of a model")
    check_values(header, limits.HEADER_VALUES, what)
    return size or 0


def _unreadable(file: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{file.name} in {file.parent} cannot be read ({short(error)}); fix it or download it again")
