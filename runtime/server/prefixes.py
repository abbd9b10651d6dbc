"""Kept sessions, each of the beginning of an earlier prompt or of one with its answer: in memory, or in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import KvqError
from kvq.runtime.server.leftovers import OwnFolder
from kvq.runtime.server.protocol import Settings

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

MOST_KEPT = 1024  # in memory and on disk together: every request is compared with all of them


@dataclass(eq=False)
class Prefix:
    """A kept session. Its tokens never change, so a file written once stays good.

    Attributes:
        settings, tokens: what the session holds; int64 [length].
        session: None while it is on disk only.
        nbytes: of the store when it was last in memory.
        path, file_nbytes: of the file, if one was written.
        used: tick of the clock of `Prefixes` at the last use.
        branches: different texts go on from here, so a longer one does not replace it.
        exact: it holds what prefilling its tokens anew in whole chunks would hold.
        answer: it ends with an answer, and has the prompt in `before`, as far as that is kept.
    """

    settings: Settings
    tokens: np.ndarray
    session: Session | None
    nbytes: int
    path: Path | None = None
    file_nbytes: int = 0
    used: int = 0
    branches: bool = False
    exact: bool = True
    answer: bool = False
    before: Prefix | None = None

    def shared(self, ids: np.ndarray) -> int:
        """How many of its tokens a prompt int64 [tokens] begins with."""
        return shared_length(self.tokens, ids)


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts int64 [tokens] begin with alike."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


class Prefixes:
    """All kept sessions of a server. One thread uses it.

    Args:
        model: the loaded model.
        backend: as in `Model.session`.
        folder: where the folder of the files is made; None is the system's for temporary files.
        disk_limit: most bytes of the files.
        log: told in one line when a file cannot be written or read.

    Attributes:
        evictions, restores, dropped_files: how often a session went out of memory, came back from its file, and a file
            was removed to make room for another.
    """

    def __init__(
        self, model: Model, backend: str | None, folder: Path | None, disk_limit: int, log: Callable[[str], None]
    ) -> None:
        self._model, self._backend, self._disk_limit, self._log = model, backend, disk_limit, log
        self._own = OwnFolder(folder)
        if self._own.removed:
            log(f"removed the files of {self._own.removed} server(s) that did not come to their end")
        self._kept: list[Prefix] = []
        self._clock = 0
        self._files = 0
        self.evictions = self.restores = self.dropped_files = 0

    @property
    def folder(self) -> Path:
        """Where the files are, until `close`."""
        return self._own.path

    def __contains__(self, prefix: Prefix) -> bool:
        return prefix in self._kept

    def of(self, settings: Settings) -> list[Prefix]:
        """Those of these settings."""
        return [prefix for prefix in self._kept if prefix.settings == settings]

    def sessions(self) -> list[Session]:
        """Those in memory."""
        return [prefix.session for prefix in self._kept if prefix.session is not None]

    def counts(self) -> tuple[int, int]:
        """How many are in memory, and on disk only."""
        inside = len(self.sessions())
        return inside, len(self._kept) - inside

    def file_nbytes(self) -> int:
        """Bytes of all files."""
        return sum(prefix.file_nbytes for prefix in self._kept)

    def touch(self, prefix: Prefix) -> None:
        """It is used now."""
        self._clock += 1
        prefix.used = self._clock

    def add(self, prefix: Prefix) -> None:
        """Keep one more; where there are too many, the least recently used is forgotten."""
        self._kept.append(prefix)
        self.touch(prefix)
        if len(self._kept) > MOST_KEPT:
            self.forget(min(self._kept, key=lambda p: p.used))

    def forget(self, prefix: Prefix) -> None:
        """Let go of one, and of its file."""
        prefix.session = None
        self._drop_file(prefix)

    def evict(self, spare: Prefix | None = None) -> bool:
        """Take the least recently used one out of memory, but not `spare`; False where there is none.

        It goes into a file, if the disk's bound allows that.
        """
        idle = [prefix for prefix in self._kept if prefix.session is not None and prefix is not spare]
        if not idle:
            return False
        prefix = min(idle, key=lambda p: p.used)
        session, prefix.session = prefix.session, None
        self.evictions += 1
        if session is not None and prefix.path is None:
            self._save(prefix, session)
        return True

    def _save(self, prefix: Prefix, session: Session) -> None:
        """Into a file; the least recently used files make room for it."""
        self._files += 1
        path = self.folder / f"{self._files}.kvq"
        try:
            session.save(path)
            prefix.path, prefix.file_nbytes = path, path.stat().st_size
        except (OSError, KvqError) as error:
            self._log(f"an idle session cannot be saved ({error}); its conversation will be processed anew")
            path.unlink(missing_ok=True)
            self.forget(prefix)
            return
        while self.file_nbytes() > self._disk_limit:
            oldest = min((p for p in self._kept if p.path is not None), key=lambda p: p.used)
            self.dropped_files += 1
            self._drop_file(oldest)

    def restore(self, prefix: Prefix) -> bool:
        """Back into memory from its file; False if that is gone or damaged, and the session is forgotten then."""
        if prefix.path is None:
            return False
        try:
            prefix.session = self._model.load_session(prefix.path, backend=self._backend)
        except (OSError, KvqError) as error:
            self._log(f"a saved session cannot be restored ({error}); its conversation is processed anew")
            self.forget(prefix)
            return False
        self.restores += 1
        return True

    def _drop_file(self, prefix: Prefix) -> None:
        if prefix.path is not None:
            prefix.path.unlink(missing_ok=True)
        prefix.path, prefix.file_nbytes = None, 0
        if prefix.session is None:
            self._kept.remove(prefix)

    def close(self) -> None:
        """Let go of all, and remove the files with their folder."""
        self._kept.clear()
        self._own.close()
