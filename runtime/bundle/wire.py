"""The wire format of protobuf, read strictly: whatever two readers could understand differently is refused.

https://protobuf.dev/programming-guides/encoding/ leaves a reader much room: unknown fields are skipped, a single field
may come twice (the last one counts, messages are merged), numbers may be padded or too long for their type. A file that
is checked by one reader and run by another must not use that room, so here a message holds the fields of its schema and
nothing else, single ones at most once, and numbers are as short as they can be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

# Wire types.
VARINT, FIXED64, DELIMITED, GROUP, GROUP_END, FIXED32 = range(6)
# What a field's content becomes: int (signed, 64 bits), float, str, bytes, and what `message` makes of it.
INT, FLOAT, TEXT, BYTES, MESSAGE, PACKED_INTS, PACKED_FLOATS = range(7)
WIRE_TYPE = {INT: VARINT, FLOAT: FIXED32, TEXT: DELIMITED, BYTES: DELIMITED, MESSAGE: DELIMITED}
PACKED = {INT: PACKED_INTS, FLOAT: PACKED_FLOATS}
# A tag has 32 bits; readers differ in what they make of more.
TAG_BYTES, NUMBER_BYTES = 5, 10

Message = dict[str, Any]


class WireError(ValueError):
    """Not a message of this schema, in a few words that say why."""


class Refused(ValueError):
    """A message, but with something in it that no graph of ours holds; in a few words."""


class Field(NamedTuple):
    """A field of a message: what its content is, of which message if it is one, and how often it may come."""

    name: str
    kind: int
    many: int = 0  # 0: once, and not in a list
    of: Schema | None = None


class Schema:
    """A kind of message.

    Args:
        name: for error messages.
        fields: by number.
        refused: fields that have a meaning which is not wanted, by number: why they are refused.
    """

    def __init__(self, name: str, fields: dict[int, Field], refused: dict[int, str] | None = None) -> None:
        self.name = name
        self.refused = refused or {}
        self.singles = [field.name for field in fields.values() if not field.many]
        self.by_tag: dict[int, Field] = {}
        for number, field in fields.items():
            self.by_tag[number << 3 | WIRE_TYPE[field.kind]] = field
            if field.many and field.kind in PACKED:
                self.by_tag[number << 3 | DELIMITED] = field._replace(kind=PACKED[field.kind])

    def stranger(self, tag: int) -> ValueError:
        """The error for a tag that is not in `by_tag`."""
        number = tag >> 3
        if number in self.refused:
            return Refused(self.refused[number])
        return WireError(f"field {number} of wire type {tag & 7} in a {self.name}")


def read(data: bytes, schema: Schema, at: int = 0, end: int | None = None) -> Message:
    """Name -> content of the fields of a message, lists for those that may repeat; absent ones are not there.

    Args:
        data: what holds it, from `at` to before `end`.
        schema: what it is.

    Raises:
        WireError: it is no such message.
        Refused: a field that the schema refuses.
    """
    end = len(data) if end is None else end
    found: Message = {}
    by_tag = schema.by_tag
    while at < end:
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = _varint(data, at - 1, end, TAG_BYTES)
        field = by_tag.get(tag)
        if field is None:
            raise schema.stranger(tag)
        name, kind, many, of = field
        content: Any
        if kind == INT:
            content, at = _varint(data, at, end, NUMBER_BYTES)
            if content >> 63:
                content -= 1 << 64
        elif kind == FLOAT:
            if at + 4 > end:
                raise WireError(f"a {schema.name} that is cut")
            content, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            size, at = _varint(data, at, end, TAG_BYTES)
            stop = at + size
            if stop > end:
                raise WireError(f"a {schema.name} that is cut")
            if kind == TEXT:
                content = _text(data[at:stop], schema)
            elif kind == BYTES:
                content = data[at:stop]
            elif kind == MESSAGE:
                content = read(data, of, at, stop)  # type: ignore[arg-type] # messages have a schema
            else:
                content = _packed(data, at, stop, kind)
            at = stop
        if many:
            entries = found.setdefault(name, [])
            if kind in (PACKED_INTS, PACKED_FLOATS):
                entries.extend(content)
            else:
                entries.append(content)
            if len(entries) > many:
                raise WireError(f"more than {many} of {name} in a {schema.name}")
        elif name in found:
            raise WireError(f"{name} twice in a {schema.name}")
        else:
            found[name] = content
    return found


def fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and content of every field of a message that `read` has understood, in the file's order."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at, end, TAG_BYTES)
        wire, start = tag & 7, at
        if wire == VARINT:
            _, at = _varint(data, at, end, NUMBER_BYTES)
        elif wire == FIXED32:
            at += 4
        else:
            size, start = _varint(data, at, end, TAG_BYTES)
            at = start + size
        yield tag >> 3, wire, data[start:at]


def field(number: int, wire: int, content: bytes) -> bytes:
    """A field as `fields` yields it, written."""
    size = varint(len(content)) if wire == DELIMITED else b""
    return varint(number << 3 | wire) + size + content


def varint(value: int) -> bytes:
    """A whole number from 0 on, as short as it can be."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def _varint(data: bytes, at: int, end: int, most: int) -> tuple[int, int]:
    """A number of at most so many bytes, without a sign, and where it ends."""
    if at < end and (value := data[at]) < 128:
        return value, at + 1
    value, last = 0, min(end, at + most)
    for shift in range(0, 7 * most, 7):
        if at >= last:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if not byte:
                raise WireError("a number with empty bytes at its end")
            if value >> (32 if most == TAG_BYTES else 64):
                break
            return value, at
    raise WireError("a number that is too long or cut")


def _packed(data: bytes, at: int, stop: int, kind: int) -> list[int] | list[float]:
    """Numbers side by side in one field."""
    if kind == PACKED_FLOATS:
        if (stop - at) % 4:
            raise WireError("packed floats that are cut")
        return list(struct.unpack_from(f"<{(stop - at) // 4}f", data, at))
    found = []
    while at < stop:
        value, at = _varint(data, at, stop, NUMBER_BYTES)
        found.append(value - (value >> 63 << 64))
    return found


def _text(content: bytes, schema: Schema) -> str:
    """A string; other readers do not look whether it is UTF-8, or end it at a zero byte."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise WireError(f"text that is not UTF-8 in a {schema.name}") from None
    if not text.isprintable():
        raise WireError(f"text with control characters in a {schema.name}")
    return text
