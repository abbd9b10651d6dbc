"""``--session FILE``: what a command does with a session file, and with Ctrl-C while it holds one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.options import option
from kvq.runtime.errors import SessionError

if TYPE_CHECKING:
    from kvq.runtime.model import Model
    from kvq.runtime.session import Session

SESSION = [
    option("--session", "session_file", type=click.Path(path_type=Path), metavar="FILE", section="Basics",
           help="Continue the session in FILE and save it there; made if it does not exist."),
    option("--session-readonly", is_flag=True, section="Basics", help="Leave FILE as it is: ask many questions of it."),
]  # fmt: skip
# Fixed when a session is made: its stored tokens depend on them.
FIXED = ("recent", "sink")


class SessionFile:
    """A session file over the time of one command.

    Args:
        path: the file.
        readonly: whether it is to stay as it is.
    """

    def __init__(self, path: Path, readonly: bool) -> None:
        self.path, self.readonly = path, readonly
        self.exists = readonly or os.path.lexists(path)
        self._loaded = 0
        folder = path.absolute().parent
        if not folder.is_dir():
            raise SessionError(f"there is no folder {folder} to keep the session in; make it first")

    @staticmethod
    def of(path: Path | None, readonly: bool) -> SessionFile | None:
        """None where the user has named no file."""
        if path is None and readonly:
            raise click.UsageError("--session-readonly needs a session file: give --session FILE")
        return None if path is None else SessionFile(path, readonly)

    def open(self, model: Model, settings: dict[str, Any], given: set[str]) -> Session:
        """The session of the file, or a new one of the settings (arguments of `Model.session`) where it does not exist.

        Settings that the user has given go before the file's.

        Raises:
            SessionError: the file cannot be loaded, or a setting given is another than the file's and cannot change.
        """
        if not self.exists:
            return model.session(**settings)
        changed = {name: value for name, value in settings.items() if name in given and name not in FIXED}
        session = model.load_session(self.path, **changed)
        held = {"recent": session.store.window.capacity, "sink": session.store.sink}
        for name in FIXED:
            if name in given and settings[name] != held[name]:
                raise SessionError(
                    f"{self.path} was made with --{name} {held[name]}, which cannot become {settings[name]}: leave"
                    f" --{name} out, or start another session"
                )
        self._loaded = len(session.tokens)
        return session

    def opened(self, session: Session) -> str:
        """For people: where the session comes from."""
        if not self.exists:
            return f"new session {self.path}"
        return f"{self.path}: going on after {self._loaded} tokens, policy {session.policy.name}"

    def close(self, session: Session) -> None:
        """Save, unless the file is to stay as it is."""
        if not self.readonly:
            session.save(self.path)

    def closed(self, session: Session) -> str:
        """For people: what became of it."""
        if self.readonly:
            return f"{self.path} was left as it is"
        return f"{self.path}: saved {len(session.tokens)} tokens, {os.path.getsize(self.path) / 1e3:.1f} kB"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": str(self.path), "loaded_tokens": self._loaded, "saved": not self.readonly}


class Interrupt:
    """Ctrl-C while a session is held: from `arm` on, the first one only asks to end at the next token.

    Before that, and a second time, it interrupts as usual: a half-read prompt is not worth keeping.

    Attributes:
        asked: whether the user has asked to end.
    """

    def __init__(self, enabled: bool) -> None:
        self.asked = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._armed = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._armed:
            raise KeyboardInterrupt
        self.asked = True

    def arm(self) -> None:
        """The prompt has been read: what is in the session from now on is worth keeping."""
        self._armed = self._enabled
