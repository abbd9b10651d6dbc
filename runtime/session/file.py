"""Sessions on disk: the arrays of a session behind a `SessionHeader`, written atomically, read with suspicion.

The payload is, without gaps, all little-endian::

    token ids                 uint32 [tokens]
    logits                    float32 [vocab], if the header says so
    of each bucket, in pieces of 16, 16, 32, 64 tokens and then 128 each, the last one of what is left:
        positions             int32 [count]
        key codes             uint8 [layers, kv_heads, count // 16, words, 16, 4], whole tiles
                              uint8 [layers, kv_heads, words, count % 16, 4], the one begun
                              (of the first `narrow` pages, here and below, the layers without a window alone)
        key scales            float16 [layers, kv_heads, count, 1 or 0]
        value codes           uint8 [layers, kv_heads, count, words, 4]
        value scales          float16 [layers, kv_heads, count, 1 or 0]
                              where layers have precisions of their own, keys and then values come in parts: of the
                              layers of one precision all of the above, by ids of precisions
    of the recent window, oldest token first:
        key codes, scales     uint8 [layers, kv_heads, window, words * 4], float16 [layers, kv_heads, window, 1]
        value codes, scales   likewise
        bits                  uint8 [window, 2]
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from kvq.runtime.bundle.manifest import TOKENIZER, Manifest
from kvq.runtime.compute.logits import usable
from kvq.runtime.errors import BudgetError, PolicyError, SessionError
from kvq.runtime.files import atomic_file
from kvq.runtime.kv.bucket import Bucket
from kvq.runtime.kv.pages import Page
from kvq.runtime.kv.slots import TILE_TOKENS, Encoded
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.base import DEFAULT_POLICY, Policy
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Pair
from kvq.runtime.session.header import MAGIC, SessionHeader, check_path, open_session_file
from kvq.runtime.session.session import Session
from kvq.runtime.version import VERSION

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model

FIRST_PAGE_ENDS = (16, 32, 64)  # where the pieces of a bucket's first page end, besides its own
# What a session has where neither policy nor budget is named, and what it had up to 0.2: a budget may replace it.
UNNAMED = (DEFAULT_POLICY, "fp16")
# The largest scale that a token can have in a window of so many bits: it leaves with values that half precision holds.
MOST_WINDOW_SCALE = {8: np.float16(512), 16: np.float16(2)}


def write_session(session: Session, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a session to a file; what stood there is replaced when the new file is complete.

    Args:
        overwrite: a file that is no session, too.

    Raises:
        SessionError: the file cannot be written, metadata is not made of JSON values, or what has that name is no
            session file.
    """
    check_path(path)
    _check_replaceable(Path(path), overwrite)
    store, manifest = session.store, session.model.bundle.manifest
    pending = session.pending if session.room >= 0 else []  # what follows a full context is never fed
    logits = None if pending else session.last_logits
    name, options = session.policy.recipe or (session.policy.name, None)
    parts = _parts(session, logits)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_bytes(part))
    header = SessionHeader(
        kvq=VERSION,
        model=manifest.name,
        model_digest=manifest.model_digest,
        tokenizer_digest=_tokenizer_digest(manifest),
        architecture=manifest.architecture,
        policy=name,
        policy_options=options,
        recent=store.window.capacity,
        sink=int(store.sink),
        protect_bits=store.protect_bits,
        prefill_chunk=int(session.prefill_chunk),
        prefill=session.prefill,
        kv_bits=None if session.kv_bits is None else float(session.kv_bits),
        kv_memory=None if session.kv_memory is None else float(session.kv_memory),
        tokens=store.length,
        pending=list(pending),
        window=store.window.count,
        buckets=[[*bits, bucket.count] for bits, bucket in store.buckets.items()],
        narrow=[bucket.narrow for bucket in store.buckets.values()] if store.forgotten else [],
        logits=logits is not None,
        metadata=session.metadata,
        payload_sha256=digest.hexdigest(),
    )
    start = header.encode()
    try:
        with atomic_file(path, private=True) as file:
            file.write(start)
            for part in parts:
                file.write(_bytes(part))
    except OSError as error:
        raise SessionError(f"{path} cannot be written ({error.strerror}); check the folder and free space") from None


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Raise SessionError where a session file would take the place of something that is none."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise SessionError(f"{path} is a link, a folder or a device, which no session replaces; give another path")
    with contextlib.suppress(OSError), path.open("rb") as file:  # what cannot be opened is not replaced either
        if not overwrite and not MAGIC.startswith(file.read(len(MAGIC))):
            raise SessionError(f"{path} is no session file and would be lost; give another path, or overwrite it")


def _parts(session: Session, logits: np.ndarray | None) -> list[np.ndarray]:
    """All arrays of the payload in their order, contiguous, little-endian; full pages but the first are not copied."""
    store, window = session.store, session.store.window
    parts: list[np.ndarray] = [np.array(session.tokens, "<u4")]
    if logits is not None:
        parts.append(logits.astype("<f4"))
    for bucket in store.buckets.values():
        for page, start, stop in _pieces(_in_whole_tiles(bucket)):
            parts += page.parts(start, stop)
    slots = window.slots(store.length - window.count, store.length)
    parts += [*window.keys.encoded(slots), *window.values.encoded(slots), store.due()]
    return [np.ascontiguousarray(part, part.dtype.newbyteorder("<")) for part in parts]


def _in_whole_tiles(bucket: Bucket) -> list[Page]:
    """Its pages; for a last one of less than a tile, whose layers share tiles, a copy that has a whole one."""
    return [page if page.whole_tiles else page.copy(page.count, TILE_TOKENS) for page in bucket.pages]


def _pieces(pages: list[Page]) -> Iterator[tuple[Page, int, int]]:
    """What of a bucket lies in a file together: the tokens [start, stop) of a page; the first page in parts."""
    for i, page in enumerate(pages):
        ends = [n for n in FIRST_PAGE_ENDS if n < page.count] if i == 0 else []
        for start, stop in itertools.pairwise([0, *ends, page.count]):
            yield page, start, stop


def _bytes(part: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return part.reshape(-1).view(np.uint8).data


def _tokenizer_digest(manifest: Manifest) -> str | None:
    return manifest.files[TOKENIZER]["sha256"] if TOKENIZER in manifest.files else None


def read_session(
    model: Model,
    path: str | os.PathLike[str],
    policy: str | Policy | None = None,
    *,
    prefill: str | None = None,
    backend: str | None = None,
    kv_bits: float | None = None,
    kv_memory: float | None = None,
) -> Session:
    """The session of a file. Arguments and errors as in `Model.load_session`."""
    with open_session_file(path) as (file, header):
        _check_model(header, model, path)
        session = _empty_session(header, model, path, policy, prefill, backend, kv_bits, kv_memory)
        try:
            source = _Source(file)
            tokens = source.read((header.tokens,), "<u4")
            logits = source.read((model.architecture.vocab,), "<f4") if header.logits else None
            _read_store(source, header, session.store)
        except OSError as error:
            raise SessionError(f"{path} cannot be read ({error.strerror}); check the disk") from None
        except EOFError:
            raise SessionError(f"{path} became shorter while it was read; load it again") from None
        if source.digest.hexdigest() != header.payload_sha256:
            raise SessionError(f"{path} is damaged: it has another sha256 than stated; take another copy")
    wrong = _wrong_values(session.store, tokens, logits, model.architecture.vocab)
    if wrong:
        raise SessionError(f"{path} holds {wrong}; make it again from the text")
    last_logits = None if logits is None else logits.astype(np.float32)
    session.restore(session.store, tokens.tolist(), list(header.pending), last_logits)
    session.metadata = header.metadata
    return session


def check_payload(file: BinaryIO, header: SessionHeader, path: str | os.PathLike[str]) -> None:
    """Compare the payload's digest, without a model; raises SessionError."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != header.payload_sha256:
        raise SessionError(f"{path} is damaged: it has another sha256 than stated; take another copy")


def _check_model(header: SessionHeader, model: Model, path: str | os.PathLike[str]) -> None:
    manifest = model.bundle.manifest
    ours, theirs = manifest.architecture.profiles, header.architecture.profiles
    if header.model_digest == manifest.model_digest and theirs != ours:
        raise SessionError(
            f"{path} was written with other precisions by layer than this bundle's; load it with the bundle it was made"
            " with, or make it again from the text"
        )
    if header.model_digest != manifest.model_digest or header.architecture != manifest.architecture:
        raise SessionError(
            f"{path} belongs to the model {header.model[:60]!r} (digest {header.model_digest[:12]!r}), this is"
            f" {manifest.name!r} (digest {manifest.model_digest[:12]!r}); load it with its own model (-m NAME)"
        )
    if header.tokenizer_digest != _tokenizer_digest(manifest):
        raise SessionError(
            f"{path} was written with another tokenizer than this bundle's; load it with the bundle it was made with"
        )


def _empty_session(
    header: SessionHeader,
    model: Model,
    path: str | os.PathLike[str],
    policy: str | Policy | None,
    prefill: str | None,
    backend: str | None,
    kv_bits: float | None,
    kv_memory: float | None,
) -> Session:
    """A session of the file's settings, or of the caller's where given."""
    settings: dict[str, Any] = {
        "recent": header.recent, "sink": header.sink, "prefill_chunk": header.prefill_chunk,
        "protect_bits": header.protect_bits,
        "prefill": header.prefill if prefill is None else prefill,
    }  # fmt: skip
    if policy is None and header.policy_options is None:
        raise SessionError(
            f"{path} was written under the policy object {header.policy!r:.60}, which its name cannot bring back;"
            " pass a policy to load it with"
        )
    if policy is None and kv_bits is None and kv_memory is None:
        kv_bits, kv_memory = header.kv_bits, header.kv_memory
    elif policy is None and header.policy in UNNAMED:
        policy = "auto"
    if policy is not None:
        return Session(model, policy, **settings, backend=backend, kv_bits=kv_bits, kv_memory=kv_memory)
    try:
        policy = model.policy(header.policy, **(header.policy_options or {}))
        return Session(model, policy, **settings, backend=backend, kv_bits=kv_bits, kv_memory=kv_memory)
    except (PolicyError, BudgetError) as error:
        raise SessionError(f"the policy of {path}: {error}; or pass another policy to load it with") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        # Options are a policy's own: what one does not look at before it computes is no option of its kind.
        raise SessionError(
            f"the policy of {path} cannot be made of its options ({type(error).__name__}:"
            f" {' '.join(str(error).split()):.80}); pass another policy to load it with"
        ) from None


class _Source:
    """The payload, array by array, with the digest of what was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def fill(self, array: np.ndarray) -> None:
        """Read into a contiguous array."""
        memory = _bytes(array)
        if self._file.readinto(memory) != len(memory):  # type: ignore[attr-defined] # a buffered reader has it
            raise EOFError
        self.digest.update(memory)

    def read(self, shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.fill(array)
        return array


def _read_store(source: _Source, header: SessionHeader, store: KVStore) -> None:
    """Fill an empty store."""
    narrow = header.narrow or [0] * len(header.buckets)
    for (k, v, count), pages_before in zip(header.buckets, narrow, strict=True):
        bucket = store.buckets[Pair(k, v)] = Bucket(Pair(k, v), store.geometry)
        bucket.reserve(count)
        while bucket.count < count:
            page = bucket.open_page()
            page.count = min(page.capacity, count - bucket.count)
            bucket.count += page.count
        bucket.narrow_pages(pages_before)
        pages = _in_whole_tiles(bucket)
        for page, start, stop in _pieces(pages):
            _read_piece(source, page, start, stop)
        bucket.pages = [
            page if page is own else page.copy(page.count, own.capacity)
            for page, own in zip(pages, bucket.pages, strict=True)
        ]
    window, g = store.window, store.geometry
    slots = window.slots(header.tokens - header.window, header.tokens)
    for part in (window.keys, window.values):
        shape = (g.layers, g.kv_heads, header.window)
        codes = source.read((*shape, part.codec.code_bytes(g.head_dim)), "u1")
        part.write(slots, Encoded(codes, source.read((*shape, 1), "<f2")))
    window.chosen[slots] = source.read((header.window, 2), "u1")
    window.count = header.window
    store.length = header.tokens
    store.peak_nbytes = store.nbytes


def _read_piece(source: _Source, page: Page, start: int, stop: int) -> None:
    for part in page.parts(start, stop):
        little = part.dtype.newbyteorder("<")
        if part.flags.c_contiguous and part.dtype == little:
            source.fill(part)
        else:
            part[...] = source.read(part.shape, little)


def _wrong_values(store: KVStore, tokens: np.ndarray, logits: np.ndarray | None, vocab: int) -> str:
    """What in a store that was just read cannot have been written by a session; empty if nothing."""
    if tokens.size and tokens.max() >= vocab:
        return "token ids outside the vocabulary"
    if logits is not None and not usable(logits):
        return "logits that are not finite, or larger than any model's"
    window = store.window
    used = window.slots(store.length - window.count, store.length)
    if not np.isin(window.chosen[used], list(CODECS)).all():
        return "precisions that do not exist"
    for slots in (window.keys, window.values):
        scales = slots.scales[:, :, used]
        if not ((scales >= 0) & (scales <= MOST_WINDOW_SCALE[window.bits])).all():
            return "scales out of range in the recent window"
    seen = np.zeros(store.length - window.count, bool)
    for bucket in store.buckets.values():
        places = np.concatenate([np.zeros(0, np.int32), *(page.positions[: page.count] for page in bucket.pages)])
        if places.size and (places.min() < 0 or places.max() >= len(seen) or (np.diff(places) <= 0).any()):
            return "positions out of order"
        if seen[places].any():
            return "positions that occur twice"
        seen[places] = True
        for page in bucket.pages:
            if not _finite(page):
                return "scales or halves that are not finite"
    return ""


def _finite(page: Page) -> bool:
    """Whether all scales are finite and not negative, and all codes stand for finite numbers."""
    for slots in (*page.keys.slots, *page.values.slots):
        scales = slots.scales  # free slots hold zeros
        if not (np.isfinite(scales) & (scales >= 0)).all() or not slots.codec.valid(slots.codes):
            return False
    return True
