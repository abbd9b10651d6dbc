"""Sessions that several servers share: the beginnings of prompts, in files named by what is in them.

A server writes what it keeps of a prompt, and looks here for what another has kept: behind a balancer a conversation
goes on from its file, on whichever server its next turn arrives, also where the one before was killed. A file holds
what reading the same tokens anew would hold; its name says all that this depends on, so servers that would read
otherwise never meet in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvq.runtime.errors import KvqError
from kvq.runtime.server.protocol import Settings
from kvq.runtime.version import VERSION

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

SUFFIX = ".shared.kvq"


class SharedSessions:
    """The folder of shared sessions. One thread of each server uses it.

    Args:
        folder: that all servers have.
        model, backend, chunk: as in `SessionPool`.
        disk_limit: most bytes of the files here; beyond, the least recently used go, whoever wrote them.
        log: told in one line when a file cannot be written or read.

    Attributes:
        reads, writes: sessions taken from here, and put here.
    """

    def __init__(
        self, folder: Path, model: Model, backend: str | None, chunk: int, disk_limit: int, log: Callable[[str], None]
    ) -> None:
        self._folder, self._model, self._backend, self._chunk = folder, model, backend, chunk
        self._disk_limit, self._log = disk_limit, log
        ran = model.session(backend=backend).stats()
        self._same = [
            VERSION, model.bundle.manifest.model_digest, chunk, ran.threads, ran.backend, ran.backend_detail,
        ]  # fmt: skip
        if model.architecture.profiles:
            self._same.append(model.architecture.fields()["profiles"])
        self.reads = self.writes = 0

    def _path(self, settings: Settings, tokens: np.ndarray) -> Path:
        """The file of a session with these tokens, int64 [length]."""
        name = hashlib.sha256(json.dumps([self._same, settings._asdict()]).encode())
        name.update(np.ascontiguousarray(tokens, "<i8").tobytes())
        return self._folder / (name.hexdigest()[:40] + SUFFIX)

    def longest(self, settings: Settings, ids: np.ndarray, beyond: int, most: int) -> Session | None:
        """The longest session here that a prompt begins with.

        Args:
            settings: of the session.
            ids: int64 [tokens], the prompt.
            beyond, most: its length is more than the one and at most the other.
        """
        for length in range(most // self._chunk * self._chunk, beyond, -self._chunk):
            path = self._path(settings, ids[:length])
            if not path.is_file():
                continue
            try:
                session = self._model.load_session(path, backend=self._backend)
                os.utime(path)
            except (OSError, KvqError) as error:
                self._log(f"a shared session cannot be read ({error}); its conversation is processed anew")
                continue
            if session.tokens != ids[:length].tolist() or session.pending:
                continue
            if _kind(session) != _kind(self._model.session(**settings._asdict(), backend=self._backend)):
                self._log(
                    "a shared session is of other settings than its name says; its conversation is processed anew"
                )
                continue
            self.reads += 1
            return session
        return None

    def put(self, settings: Settings, session: Session) -> None:
        """Write a session for the others, unless it is here."""
        path = self._path(settings, np.asarray(session.tokens, np.int64))
        try:
            if path.is_file():
                os.utime(path)
                return
            session.save(path)
            self.writes += 1
            self._bound(path)
        except (OSError, KvqError) as error:
            self._log(f"a session cannot be shared ({error}); other servers will process its conversation anew")

    def _bound(self, newest: Path) -> None:
        """Remove the least recently used files until they are few enough."""
        found = []
        for path in self._folder.glob("*" + SUFFIX):
            try:
                about = path.stat()
            except FileNotFoundError:  # another server was faster
                continue
            found.append((path == newest, about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, _, size, _ in found)
        for _, _, size, path in sorted(found):
            if total <= self._disk_limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _kind(session: Session) -> tuple[Any, ...]:
    """What a session was made with: a file may have been put in the place of another one."""
    policy, store = session.policy, session.store
    made = policy.recipe or (policy.name, None)
    budget = session.kv_bits, session.kv_memory
    return made, budget, store.window.capacity, store.sink, store.protect_bits, session.prefill
