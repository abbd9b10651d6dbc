"""Kept sessions: prefixes of earlier prompts, in memory and on disk, within a bound of bytes.

What is kept are forks taken while a prompt is prefilled, at lengths that are multiples of the
prefill chunk, and nothing else. A prompt is always prefilled in chunks that begin at these
lengths, so such a session holds exactly what prefilling the same tokens anew would hold, and a
response does not depend on what the server answered before. Tokens that were decoded one by one
are never reused: in a chunk they see each other unrounded, so their stored bytes would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import RequestError
from kvq.runtime.server.capacity import Capacity
from kvq.runtime.server.prefixes import Prefix, Prefixes, shared_length
from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.shared import SharedSessions
from kvq.runtime.session.drafting import Draft
from kvq.runtime.session.session import kv_nbytes
from kvq.runtime.session.statistics import size

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

MOST_SETTINGS = 64


@dataclass(eq=False)
class Lease:
    """A session at work on a request.

    Attributes:
        ids: int64 [tokens], the prompt.
        sessions: the caller's alone: the first reads the prompt, the others are forks of it, one for each choice.
        cached: tokens of the prompt that it held from the start.
        boundaries: lengths at which a fork is still to be kept.
        branches: those of them up to which another prompt goes the same way and then its own.
        most_nbytes: what its store can grow to.
        parent: the longest kept prefix of the prompt.
        state: bytes of the store and of its shared growing pages, when all bytes were last counted.
    """

    ids: np.ndarray
    settings: Settings
    capacity: Capacity
    sessions: list[Session]
    cached: int
    boundaries: list[int]
    branches: set[int]
    most_nbytes: int
    parent: Prefix | None
    state: tuple[int, int] = (0, 0)

    @property
    def session(self) -> Session:
        """The one that reads the prompt."""
        return self.sessions[0]


class SessionPool:
    """All sessions of a server. One thread uses it.

    Args:
        model: the loaded model.
        limit: most bytes of all KV stores together, pages that sessions share counted once; None is no limit.
        folder: where sessions are saved; None makes a temporary one, which `close` removes.
        disk_limit: most bytes of the files.
        chunk: tokens of a prefill chunk.
        backend: as in `Model.session`.
        log: told in one line when a file cannot be written or read.
        shared: sessions of other servers' too; None for none.

    Attributes:
        prefixes: the kept sessions.
        hits: requests that began with one of them.
        known_nbytes: of all stores; too much where something was let go since.
        peak_nbytes: the largest that it was.
    """

    def __init__(
        self,
        model: Model,
        limit: int | None,
        folder: Path | None,
        disk_limit: int,
        chunk: int,
        backend: str | None,
        log: Callable[[str], None],
        shared: SharedSessions | None = None,
    ) -> None:
        self.shared = shared
        self.model, self.limit, self.chunk, self.backend = model, limit, chunk, backend
        self.prefixes = Prefixes(model, backend, folder, disk_limit, log)
        self._leases: list[Lease] = []
        self._capacities: dict[Settings, Capacity] = {}
        self.hits = self.known_nbytes = self.peak_nbytes = 0

    # -- what a request may take ------------------------------------------------------------------

    def check_draft(self, settings: Settings, draft: Draft) -> None:
        """Raise SamplingError for a draft option that sessions of such settings cannot follow."""
        self.model.session(**settings._asdict(), backend=self.backend).drafter.most(draft)

    def check(self, settings: Settings, length: int, copies: int = 1) -> Capacity:
        """Bounds for a request; one that would not even fit alone is refused. Thread-safe.

        Args:
            settings: of its session.
            length: most tokens it can come to.
            copies: how many texts go on from its prompt.

        Raises:
            RequestError: 413, it needs more bytes than all sessions may have.
            KvqError: unknown policy, a budget that cannot be kept.
        """
        capacity = self._capacities.get(settings)
        if capacity is None:
            session = self.model.session(**settings._asdict(), backend=self.backend)
            if len(self._capacities) >= MOST_SETTINGS:  # kv_bits can be any number
                self._capacities.clear()
            capacity = self._capacities[settings] = Capacity(session)
        most = copies * capacity.most_nbytes(length)
        if self.limit is not None and most > self.limit:
            raise RequestError(
                f"{'a KV cache' if copies == 1 else f'{copies} KV caches'} of {length} tokens may take {size(most)},"
                f" the server has {size(self.limit)} for all;"
                " shorten the prompt, ask for fewer max_tokens, or for fewer kv_bits",
                413,
                "kv_memory_exceeded",
            )
        return capacity

    # -- a request's way through ------------------------------------------------------------------

    def begin(
        self, ids: np.ndarray, settings: Settings, capacity: Capacity, length: int, copies: int = 1, whole: bool = False
    ) -> Lease | None:
        """A session that holds the longest kept beginning of a prompt; None if there is no room now.

        Args:
            ids: int64 [tokens], the prompt.
            settings, capacity: of the session, see `check`.
            length: most tokens the request can come to.
            copies: how many texts go on from the prompt.
            whole: all of the prompt is to be read, for its logits.
        """
        most = copies * capacity.most_nbytes(length)
        if self.limit is not None and sum(lease.most_nbytes for lease in self._leases) + most > self.limit:
            return None
        last = (len(ids) - 1) // self.chunk * self.chunk  # at least one token is left to give logits
        if self.shared is not None and not whole:
            self._fetch(self.shared, ids, settings, last)
        common = [(prefix, prefix.shared(ids)) for prefix in self.prefixes.of(settings)]
        # Where an earlier prompt goes another way, both are likely to come back: a document, a system prompt.
        parted = (shared for prefix, shared in common if shared < len(prefix.tokens))
        branch = min(max(parted, default=0) // self.chunk * self.chunk, last)
        fitting = [prefix for prefix, shared in common if shared == len(prefix.tokens) <= last and not whole]
        parent, session = None, None
        for parent in sorted(fitting, key=lambda prefix: len(prefix.tokens), reverse=True):
            session = self._fork_of(parent)
            if session is not None:
                self.hits += 1
                parent.branches |= len(parent.tokens) == branch
                break
        if session is None:
            self._make_room(capacity.most_nbytes(0))
            parent, session = None, self._new_session(settings, capacity)
        cached = len(session.tokens)
        boundaries = [at for at in sorted({branch, last}) if at > cached]
        lease = Lease(ids, settings, capacity, [session], cached, boundaries, {branch}, most, parent)
        self._leases.append(lease)
        self._count()
        return lease

    def awaits(self, ids: np.ndarray, settings: Settings) -> bool:
        """Whether a prompt int64 [tokens] begins as one does that is being read just now, further than anything kept.

        Then a fork of that is kept where the two part, and it is soon there: nobody needs to read the same twice.
        """
        last = (len(ids) - 1) // self.chunk * self.chunk
        kept = [len(prefix.tokens) for prefix in self.prefixes.of(settings) if prefix.shared(ids) == len(prefix.tokens)]
        for lease in self._leases:
            at = min(shared_length(lease.ids, ids) // self.chunk * self.chunk, last)
            if lease.settings == settings and at > max([len(lease.session.tokens), *kept]):
                if at not in lease.boundaries:
                    lease.boundaries.append(at)
                lease.branches.add(at)
                return True
        return False

    def _fetch(self, shared: SharedSessions, ids: np.ndarray, settings: Settings, last: int) -> None:
        """Keep what another server has kept of a prompt, where that is more than what is kept here."""
        known = [(len(prefix.tokens), prefix.shared(ids)) for prefix in self.prefixes.of(settings)]
        here = max((length for length, common in known if length == common <= last), default=0)
        session = shared.longest(settings, ids, here, last)
        if session is not None and self._make_room(session.store.nbytes):
            session.last_logits = None
            tokens = np.asarray(session.tokens, np.int64)
            self.prefixes.add(Prefix(settings, tokens, session, session.store.nbytes))
            self._count()

    def _new_session(self, settings: Settings, capacity: Capacity) -> Session:
        """An empty session. Its budget is the one made once: for some policies that takes a second."""
        session = self.model.session(
            capacity.policy, recent=settings.recent, sink=settings.sink, prefill_chunk=self.chunk,
            prefill=settings.prefill, backend=self.backend, protect_bits=settings.protect_bits,
        )  # fmt: skip
        session.chooser.budget = capacity.budget
        return session

    def _fork_of(self, prefix: Prefix) -> Session | None:
        """A fork of a kept session, restored if need be; None if its file is gone or there is no room."""
        self.prefixes.touch(prefix)
        if prefix.session is None:
            if not self._make_room(prefix.nbytes, spare=prefix) or not self.prefixes.restore(prefix):
                return None
            self._count()
        session = prefix.session
        if session is None or not self._make_room(session.store.fork_nbytes, spare=prefix):
            return None
        return session.fork()

    def room_for(self, appends: Iterable[tuple[Lease, Session, int]]) -> None:
        """Before a pass: idle sessions go to disk if that many tokens of these may need their bytes."""
        self._make_room(sum(lease.capacity.growth(session.store, tokens) for lease, session, tokens in appends))

    def fork(self, lease: Lease) -> Session:
        """One more session that goes on from the lease's prompt."""
        self._make_room(lease.session.store.fork_nbytes)
        session = lease.session.fork()
        lease.sessions.append(session)
        self._count()
        return session

    def appended(self, lease: Lease) -> None:
        """After an append."""
        stores = [session.store for session in lease.sessions]
        state = (sum(store.nbytes for store in stores), sum(store.growing_nbytes(shared=True) for store in stores))
        if state != lease.state:
            lease.state = state
            self._count()

    def keep(self, lease: Lease) -> None:
        """Keep a fork of the session as it is, if this is a length to keep it at and there is room."""
        length = len(lease.session.tokens)
        if length not in lease.boundaries:
            return
        lease.boundaries.remove(length)
        tokens = np.asarray(lease.session.tokens, np.int64)
        for prefix in self.prefixes.of(lease.settings):
            if np.array_equal(prefix.tokens, tokens):
                self.prefixes.touch(prefix)
                prefix.branches |= length in lease.branches
                return
        if not self._make_room(lease.session.store.fork_nbytes):
            return
        session = lease.session.fork()
        session.last_logits = None  # as many bytes as some tokens, and never looked at
        lease.state = (0, 0)  # its growing pages are shared now
        kept = Prefix(lease.settings, tokens, session, session.store.nbytes, branches=length in lease.branches)
        parent, lease.parent = lease.parent, kept
        if parent is not None and not parent.branches and parent in self.prefixes:
            self.prefixes.forget(parent)
        self.prefixes.add(kept)
        self._count()
        if self.shared is not None:
            self.shared.put(lease.settings, session)

    def end(self, lease: Lease) -> None:
        """The request is over; what it has appended beyond the kept lengths is forgotten."""
        self._leases.remove(lease)

    def close(self) -> None:
        """Remove all files."""
        self.prefixes.close()

    # -- bytes ------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of all KV stores, shared pages counted once."""
        leased = [session for lease in self._leases for session in lease.sessions]
        return kv_nbytes([*self.prefixes.sessions(), *leased])

    def _count(self) -> None:
        """Count all bytes, after any may have been added."""
        self.known_nbytes = self.nbytes()
        self.peak_nbytes = max(self.peak_nbytes, self.known_nbytes)

    def _make_room(self, nbytes: int, spare: Prefix | None = None) -> bool:
        """Save the least recently used idle sessions until so many bytes are free; False if that is not enough."""
        if self.limit is None or self.known_nbytes + nbytes <= self.limit:
            return True
        while True:
            self.known_nbytes = self.nbytes()
            if self.known_nbytes + nbytes <= self.limit:
                return True
            if not self.prefixes.evict(spare):
                return False
