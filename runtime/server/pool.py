"""Kept sessions: prefixes of earlier prompts and answers, in memory and on disk, within a bound of bytes.

A request whose answer somebody may ask for again, by a seed or because nothing is drawn, is strict: its answer must not
depend on what the server answered before. Its prompt is prefilled in chunks that begin at multiples of the chunk, and
it goes on from exact sessions alone: forks taken at such lengths, which hold what prefilling the same tokens anew would
hold. Tokens that were decoded one by one are not among them: in a chunk they see each other unrounded, so their stored
bytes would differ.

The answer of any other request is drawn by chance, and what differs by rounding cannot be told from that: it goes on
from answers, too, and others need not wait for whole chunks of its prompt. Where feeding makes no difference
(docs/stepwise.md) every session is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import RequestError
from kvq.runtime.server.capacity import Capacity
from kvq.runtime.server.lease import Lease
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
WORTH_CUTTING = 48  # tokens to be had by it: as many as stand in a window are run again


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
        self,
        ids: np.ndarray,
        settings: Settings,
        capacity: Capacity,
        length: int,
        copies: int = 1,
        whole: bool = False,
        strict: bool = True,
    ) -> Lease | None:
        """A session that holds the longest kept beginning of a prompt; None if there is no room now.

        Args:
            ids: int64 [tokens], the prompt.
            settings, capacity: of the session, see `check`.
            length: most tokens the request can come to.
            copies: how many texts go on from the prompt.
            whole: all of the prompt is to be read, for its logits.
            strict: the answer must not depend on what was answered before.
        """
        exact = strict or self.shared is not None  # what servers share is
        most = copies * capacity.most_nbytes(length)
        if self.limit is not None and sum(lease.most_nbytes for lease in self._leases) + most > self.limit:
            return None
        last = (len(ids) - 1) // self.chunk * self.chunk  # at least one token is left to give logits
        if self.shared is not None and not whole:
            self._fetch(self.shared, ids, settings, last)
        common = [(prefix.shared(ids), prefix) for prefix in self.prefixes.of(settings)]
        # Where an earlier prompt goes another way, both are likely to come back: a document, a system prompt.
        parted = (shared for shared, prefix in common if shared < len(prefix.tokens) and not prefix.answer)
        branch = min(max(parted, default=0) // self.chunk * self.chunk, last)
        parent, session = (None, None) if whole else self._go_on(ids, common, exact, capacity)
        if session is None:
            self._make_room(capacity.most_nbytes(0))
            session = self._new_session(settings, capacity)
        if parent is not None:
            parent.branches |= len(parent.tokens) == branch
        cached = len(session.tokens)
        boundaries = [at for at in sorted({branch, last}) if at > cached]
        lease = Lease(
            ids, settings, capacity, [session], strict=exact and not capacity.alike,
            exact=not cached if parent is None else parent.exact, cached=cached, boundaries=boundaries,
            branches={branch}, most_nbytes=most, parent=parent,
        )  # fmt: skip
        self._leases.append(lease)
        self._count()
        return lease

    def _go_on(
        self, ids: np.ndarray, common: Sequence[tuple[int, Prefix]], exact: bool, capacity: Capacity
    ) -> tuple[Prefix | None, Session | None]:
        """A fork of the kept session that has most of a prompt, and which it is; None and None if there is none.

        Args:
            ids: int64 [tokens], the prompt.
            common: kept sessions, and how many of their tokens the prompt begins with.
            exact: of the exact ones alone that have nothing else. Otherwise one that goes another way is cut where
                they part, which runs the last tokens before that again; what is left is then not the kept one.
        """
        found = [each for each in common if each[0] == len(each[1].tokens) < len(ids) and (each[1].exact or not exact)]
        if not exact:
            least = max((shared for shared, _ in found), default=0) + WORTH_CUTTING
            cuts = [(min(shared, len(ids) - 1), prefix) for shared, prefix in common if shared >= least]
            found += [(length, prefix) for length, prefix in cuts if length < len(prefix.tokens)]
        for length, prefix in sorted(found, key=lambda each: each[0], reverse=True):
            session = self._fork_of(prefix)
            if session is None:
                continue
            if length == len(session.tokens):
                self.hits += 1
                return prefix, session
            # Where the store has forgotten what an earlier end needs, all of it would run again.
            if not session.store.least_trim and self._make_room(capacity.growth_by_cutting(session.store), prefix):
                self.hits += 1
                session.trim(length)
                return None, session
        return None, None

    def awaits(self, ids: np.ndarray, settings: Settings, capacity: Capacity, strict: bool = True) -> bool:
        """Whether a prompt int64 [tokens] begins as one does that is being read just now, further than anything kept.

        Then a fork of that is kept where the two part, and it is soon there: nobody needs to read the same twice.
        """
        exact = strict or self.shared is not None
        last = (len(ids) - 1) // self.chunk * self.chunk
        usable = [prefix for prefix in self.prefixes.of(settings) if prefix.exact or not exact]
        kept = [len(prefix.tokens) for prefix in usable if prefix.shared(ids) == len(prefix.tokens)]
        for lease in self._leases:
            at = min(shared_length(lease.ids, ids) // self.chunk * self.chunk, last)
            if exact and not (lease.exact and (lease.strict or capacity.alike)):
                continue  # what will be kept of it is of no use here
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
        branches = length in lease.branches
        kept = self._keep(lease, lease.session, branches)
        if kept is None:
            return
        before, lease.parent = lease.parent, kept
        while before is not None and not before.branches and before in self.prefixes:
            self.prefixes.forget(before)
            before = before.before
        if self.shared is not None and kept.exact:
            self.shared.put(lease.settings, kept.session or lease.session)

    def keep_answer(self, lease: Lease, session: Session) -> None:
        """Keep a fork of one of the lease's sessions, which has come to its end, for who goes on from the answer."""
        if lease.strict:
            return
        lease.loosen()
        kept = self._keep(lease, session, branches=False)
        if kept is not None:
            kept.answer, kept.before = True, lease.parent

    def _keep(self, lease: Lease, session: Session, branches: bool) -> Prefix | None:
        """Keep a fork of a session; None where one is kept already, or there is no room."""
        tokens = np.asarray(session.tokens, np.int64)
        for prefix in self.prefixes.of(lease.settings):
            if np.array_equal(prefix.tokens, tokens) and prefix.exact >= lease.exact:
                self.prefixes.touch(prefix)
                prefix.branches |= branches
                return None
        if not self._make_room(session.store.fork_nbytes):
            return None
        fork = session.fork()
        fork.last_logits = None  # as many bytes as some tokens, and never looked at
        fork.pending.clear()
        lease.state = (0, 0)  # its growing pages are shared now
        kept = Prefix(lease.settings, tokens, fork, fork.store.nbytes, branches=branches, exact=lease.exact)
        self.prefixes.add(kept)
        self._count()
        return kept

    def end(self, lease: Lease) -> None:
        """The request is over; what it has appended beyond what is kept is forgotten."""
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
