"""What the pool lends to a request: its sessions, and how its prompt is read into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.server.capacity import Capacity
from kvq.runtime.server.prefixes import Prefix
from kvq.runtime.server.protocol import Settings

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session

PIECE = 64  # tokens that a prompt is read by while texts are being generated, where it need not be whole chunks


@dataclass(eq=False)
class Lease:
    """A session at work on a request.

    Attributes:
        ids: int64 [tokens], the prompt.
        sessions: the caller's alone: the first reads the prompt, the others are forks of it, one for each choice.
        strict: the answer must not depend on what was fed before, and it would.
        exact: its session holds what prefilling all of it anew in whole chunks would hold.
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
    strict: bool
    exact: bool
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

    def following(self, chunk: int, busy: bool) -> np.ndarray:
        """The tokens of the prompt that are appended next, int64: up to the next multiple of the chunk.

        busy: texts are being generated; they wait for no more than `PIECE` of them where that is allowed.
        """
        done, whole = len(self.session.tokens), len(self.ids)
        step = min(PIECE, chunk) if busy and not self.strict else chunk
        end = min((done // step + 1) * step, (done // chunk + 1) * chunk, whole)
        if end % chunk and end < whole:
            self.loosen()
        return self.ids[done:end]

    def loosen(self) -> None:
        """It was fed otherwise than anew in whole chunks."""
        self.exact = self.exact and self.capacity.alike
