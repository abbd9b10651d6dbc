"""The beginning of a session file: what it is of and what follows, checked before anything is allocated.

A session file is, all numbers little-endian::

    magic             8 bytes
    format version    uint32
    header bytes      uint32
    header sha256     32 bytes
    header            JSON, see `SessionHeader`
    payload           arrays, see `kvq.runtime.session.file`, whose sizes follow from the header alone
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.bundle.profiles import check_profiles
from kvq.runtime.errors import SessionError
from kvq.runtime.files import is_path
from kvq.runtime.kv.pages import PAGE_TOKENS
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import PROTECTED, Pair

MAGIC = b"KVQSESS\n"
FORMAT_VERSION = 1
PREAMBLE = struct.Struct("<8sII32s")
# A conversation's transcript lies in the header, so it may be long; but it is few values, mostly text.
HEADER_MAX_BYTES = 1 << 24
MOST_PARTS = 300_000  # a message of a conversation has a dozen
PARTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)  # an unfinished text goes to the end
# How tokens appended together are processed, see `Session`.
PREFILLS = ("auto", "stepwise", "chunked")
# Settings that no array is made of, but that arithmetic has to bear.
MOST_TOKENS = 1 << 31
MOST_BUCKETS = len(CODECS) ** 2
MOST_OPTION, MOST_OPTION_DEPTH = 1 << 128, 8


@dataclass(frozen=True)
class SessionHeader:
    """What a session file says about itself.

    Attributes:
        kvq: version that wrote it.
        model, model_digest, tokenizer_digest, architecture: the model it belongs to; digest None without a tokenizer.
        policy: name of the precision policy.
        policy_options: what to make it with by its name; None: it was an object of the caller's own.
        recent, sink, prefill_chunk, kv_bits, kv_memory: as in `Session`; recent after it was limited to the context.
        prefill: as in `Session`; files of before it was a choice do not have it.
        protect_bits: bits of window and sink, likewise.
        tokens: cached tokens.
        pending: ids sampled but not cached.
        window: how many of the tokens stand in the recent window.
        buckets: [id of keys' precision, of values', tokens] of each bucket, in the order in which attention sums.
        logits: whether the logits after the last token are in the file: where no pending token follows them.
        narrow: of each bucket how many pages, its first ones, hold the layers without a window alone; empty: none.
        metadata: the caller's.
        payload_sha256: of everything behind the header.
    """

    kvq: str
    model: str
    model_digest: str
    tokenizer_digest: str | None
    architecture: Architecture
    policy: str
    policy_options: dict[str, Any] | None
    recent: int
    sink: int
    prefill_chunk: int
    kv_bits: float | None
    kv_memory: float | None
    tokens: int
    pending: list[int]
    window: int
    buckets: list[list[int]]
    logits: bool
    metadata: dict[str, Any]
    payload_sha256: str = ""
    prefill: str = "auto"
    protect_bits: int = 16
    narrow: list[int] = field(default_factory=list)

    def precisions(self) -> dict[str, dict[str, int]]:
        """Tokens and bytes in the file by precision, as `KVStore.account` names them."""
        shape = self.architecture
        geometry = shape.geometry
        rows = {
            str(Pair(k, v)): {"tokens": count, "nbytes": count * geometry.token_bytes((k, v))}
            for k, v, count in self.buckets
        }
        for (k, v, _), narrow in zip(self.buckets, self.narrow, strict=False):
            freed = geometry.token_bytes((k, v)) - geometry.narrow.token_bytes((k, v))
            rows[str(Pair(k, v))]["nbytes"] -= narrow * PAGE_TOKENS * freed
        rows["recent"] = {"tokens": self.window, "nbytes": self.window * geometry.window_token_bytes(self.protect_bits)}
        return rows

    @property
    def payload_nbytes(self) -> int:
        """Bytes behind the header."""
        logits = 4 * self.architecture.vocab if self.logits else 0
        return 4 * self.tokens + logits + sum(row["nbytes"] for row in self.precisions().values())

    def encode(self) -> bytes:
        """Everything before the payload.

        Raises:
            SessionError: metadata or policy options that JSON does not give back as they are, or too much of them.
        """
        if type(self.metadata) is not dict:
            raise SessionError(f"metadata must be a dictionary, got {self.metadata!r:.60}; keep it under a name in one")
        for name, value in (("metadata", self.metadata), ("the policy's options", self.policy_options)):
            try:
                same = json.loads(json.dumps(value, allow_nan=False)) == value
            except (TypeError, ValueError, RecursionError):
                same = False
            if not same:
                raise SessionError(
                    f"{name} must be JSON values that come back as they are: dictionaries with text as keys, lists,"
                    f" text, finite numbers, booleans, None; got {value!r:.80}"
                )
        content = asdict(self) | {"architecture": self.architecture.fields()}
        if not self.narrow:
            del content["narrow"]
        text = json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")
        if len(text) > HEADER_MAX_BYTES:
            raise SessionError(
                f"metadata takes {len(text)} bytes, a session file holds {HEADER_MAX_BYTES}; keep less in it"
            )
        if _parts(text) > MOST_PARTS:
            raise SessionError(f"metadata has more than {MOST_PARTS} values and separators; keep less in it")
        return PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(text), hashlib.sha256(text).digest()) + text


@contextmanager
def open_session_file(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, SessionHeader]]:
    """The file, positioned at its payload, and its header; sizes agree, the payload has not been looked at.

    Raises:
        SessionError: it cannot be read, or is no complete session file of this format version.
    """
    with _open_regular(path) as file:
        try:
            header = _read_header(file, os.fspath(path))
        except OSError as error:
            raise SessionError(f"{path} cannot be read ({error.strerror}); check the disk") from None
        yield file, header


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise SessionError for what no session file could be named."""
    if not isinstance(path, str | os.PathLike):
        raise SessionError(f"a session file is named by a path, got {path!r:.60}")
    text = os.fspath(path)
    if not isinstance(text, str) or not Path(text).name or not is_path(text):
        raise SessionError(f"{text!r:.60} is no name for a session file; give another path")


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    check_path(path)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        if error.errno == errno.ENOENT:
            why = f"no session file {path}; check the path, or make one with kvq prefill or session.save"
        elif error.errno == errno.ELOOP:
            why = f"{path} is a link; give the path of the session file itself"
        elif error.errno == errno.EISDIR:
            why = f"{path} is a folder; give the path of a session file"
        else:
            why = f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        raise SessionError(why) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise SessionError(f"{path} is not a regular file; give the path of a session file")
    return file


def _read_header(file: BinaryIO, path: str) -> SessionHeader:
    size = os.fstat(file.fileno()).st_size
    start = file.read(PREAMBLE.size)
    if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
        raise SessionError(f"{path} is not a session file; make one with kvq prefill or session.save")
    if len(start) < PREAMBLE.size:
        raise SessionError(f"{path} is cut off: it has {size} bytes, less than a header; take another copy")
    _, version, length, digest = PREAMBLE.unpack(start)
    if version != FORMAT_VERSION:
        raise SessionError(
            f"{path} is of session format version {version}, this kvq reads {FORMAT_VERSION}; make it again from the"
            " text, or use the kvq that wrote it"
        )
    if length > HEADER_MAX_BYTES:
        raise SessionError(f"{path} is damaged: a header of {length} bytes; make it again from the text")
    if length > size - PREAMBLE.size:
        raise SessionError(f"{path} is cut off in its header: it has {size} bytes; take another copy")
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise SessionError(f"{path} is damaged: its header has another sha256 than stated; take another copy")
    header = _parse(text, path)
    stated, found = header.payload_nbytes, size - PREAMBLE.size - length
    if stated != found:
        what = "is cut off" if found < stated else "has bytes behind its end"
        raise SessionError(
            f"{path} {what}: {found} bytes follow the header, {stated} are stated; take another copy, or make it again"
        )
    return header


def _parts(text: bytes) -> int:
    """How many texts, commas and opening brackets JSON has, without reading it; not counted beyond too many."""
    count = 0
    for count, _ in enumerate(PARTS.finditer(text), 1):
        if count > MOST_PARTS:
            break
    return count


def _parse(text: bytes, path: str) -> SessionHeader:
    try:
        if _parts(text) > MOST_PARTS:
            raise ValueError("too many values")
        data = json.loads(text.decode(errors="surrogatepass"), parse_constant=_refuse_constant)
        shape = data["architecture"] = Architecture.of(given := data["architecture"])
        if given.keys() - asdict(shape).keys():
            raise ValueError("the architecture has other fields")
        header = SessionHeader(**data)
        _check_types(header)
        _check_counts(header)
        return header
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SessionError(
            f"{path} has a header that makes no sense ({' '.join(str(error).split()):.80}); make it again from the text"
        ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _check_types(header: SessionHeader) -> None:
    """Raise ValueError for a value of another type than stated."""
    for name in ("kvq", "model", "model_digest", "policy", "payload_sha256"):
        if type(getattr(header, name)) is not str:
            raise ValueError(f"{name} is {getattr(header, name)!r}")
    if type(header.tokenizer_digest) not in (str, type(None)):
        raise ValueError(f"tokenizer_digest is {header.tokenizer_digest!r}")
    if type(header.logits) is not bool or type(header.metadata) is not dict:
        raise ValueError("logits or metadata is of another type")
    if (
        type(header.policy_options) not in (dict, type(None))
        or {"policy", "bundle"} & (header.policy_options or {}).keys()
    ):
        raise ValueError("policy_options is not a dictionary of options")
    _check_option(header.policy_options)
    if header.prefill not in PREFILLS:
        raise ValueError(f"prefill is {header.prefill!r}")
    if type(header.protect_bits) is not int or header.protect_bits not in PROTECTED:
        raise ValueError(f"protect_bits is {header.protect_bits!r}")
    for name in ("kv_bits", "kv_memory"):
        value = getattr(header, name)
        if value is not None and (type(value) not in (int, float) or not 0 < float(value) < math.inf):
            raise ValueError(f"{name} is {value!r}")
    if type(header.pending) is not list or type(header.buckets) is not list:
        raise ValueError("pending or buckets is not a list")
    if len(header.buckets) > MOST_BUCKETS:
        raise ValueError(f"{len(header.buckets)} buckets")
    if not all(type(row) is list and len(row) == 3 for row in header.buckets):
        raise ValueError("buckets are not rows of key bits, value bits, tokens")


def _check_option(value: Any, depth: int = 0) -> None:
    """Raise ValueError for an option of a policy that arithmetic need not bear."""
    if depth > MOST_OPTION_DEPTH:
        raise ValueError(f"policy_options are nested deeper than {MOST_OPTION_DEPTH}")
    if type(value) in (int, float) and not -MOST_OPTION < value < MOST_OPTION:
        raise ValueError(f"policy_options hold {value!r:.40}")
    for part in value.values() if type(value) is dict else value if type(value) is list else ():
        _check_option(part, depth + 1)


def _check_counts(header: SessionHeader) -> None:
    """Raise ValueError for numbers that do not fit each other or the architecture."""
    shape = header.architecture
    for name in shape.fields().keys() - {"windows", "profiles"}:
        _within(name, getattr(shape, name), 1, MOST_TOKENS)
    if shape.windows and len(shape.windows) != shape.layers:
        raise ValueError(f"{len(shape.windows)} windows of {shape.layers} layers")
    for window in shape.windows:
        _within("a window", window, 0, MOST_TOKENS)
    check_profiles(shape.geometry)
    _within("recent", header.recent, 0, shape.context)
    _within("sink", header.sink, 0, MOST_TOKENS)
    _within("prefill_chunk", header.prefill_chunk, 1, MOST_TOKENS)
    _within("tokens", header.tokens, 0, shape.context)
    _within("window", header.window, 0, min(header.recent, header.tokens))
    _within("pending tokens", len(header.pending), 0, shape.context - header.tokens)
    for token in header.pending:
        _within("a pending id", token, 0, shape.vocab - 1)
    seen = set()
    for k, v, count in header.buckets:
        if type(k) is not int or type(v) is not int or not {k, v} <= CODECS.keys() or (k, v) in seen:
            raise ValueError(f"a bucket of {k!r} and {v!r} bits")
        seen.add((k, v))
        _within("tokens of a bucket", count, 0, header.tokens)
    if type(header.narrow) is not list or len(header.narrow) not in (0, len(header.buckets)):
        raise ValueError("narrow is no list of a number for each bucket")
    for narrow, row in zip(header.narrow, header.buckets, strict=False):
        _within("narrow pages of a bucket", narrow, 0, row[2] // PAGE_TOKENS if shape.window else 0)
    held = header.window + sum(row[2] for row in header.buckets)
    if held != header.tokens:
        raise ValueError(f"{held} tokens in window and buckets, {header.tokens} in the text")
    if header.logits and (header.pending or not header.tokens):
        raise ValueError("logits beside pending tokens or of an empty text")


def _within(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not an integer from {least} to {most}")
