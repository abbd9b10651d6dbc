"""``--session FILE``: what a command does with a session file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvq.runtime.cli.options import option
from kvq.runtime.errors import PromptError, SessionError

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

SESSION = [
    option("--session", "session_file", type=click.Path(path_type=Path), metavar="FILE", section="Basics",
           help="Continue the session in FILE and save it there; made if it does not exist."),
    option("--session-readonly", is_flag=True, section="Basics", help="Leave FILE as it is: ask many questions of it."),
]  # fmt: skip
# Fixed when a session is made: its stored tokens depend on them.
FIXED = ("recent", "sink", "protect_bits")


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
        stats, context = session.stats(), model.architecture.context
        held = {name: getattr(stats, name) for name in FIXED}
        wanted = {**settings, "recent": min(settings["recent"], context)}  # as a new session has them
        for name in FIXED:
            if name in given and wanted[name] != held[name]:
                flag = f"--{name.replace('_', '-')}"
                raise SessionError(
                    f"{self.path} was made with {flag} {held[name]}, which cannot become {settings[name]}: leave"
                    f" {flag} out, or start another session"
                )
        self._loaded = len(session.tokens)
        return session

    def opened(self, session: Session, conversation: Conversation | None) -> str:
        """For people: where the session comes from, and what is in it."""
        from kvq.runtime.chat.conversation import has_template

        if not self.exists:
            return f"new session {self.path}"
        said = f"{self.path}: going on after {self._loaded} tokens, policy {session.policy.name}"
        if conversation is None:
            return said + ("; plain text, no conversation" if has_template(session.model) else "")
        turns = len(conversation.turns)
        parts = [f"{turns} turn{'s' * (turns != 1)}"] if turns else []
        parts += ["a document to ask about"] if conversation.document else []
        return "; ".join([said, " and ".join(parts)] if parts else [said])

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


def conversation_of(session: Session, system: str | None, raw: bool) -> Conversation | None:
    """The conversation that a prompt is a turn of; None where it is text to go on with.

    That is so with --raw, with a model that has no chat template, and in a session that began so.

    Raises:
        SessionError: --raw, but the session holds a conversation.
        PromptError: a system prompt that has no place.
    """
    from kvq.runtime.chat.conversation import KEY, Conversation, has_template

    begun = bool(session.tokens or session.pending)
    if KEY in session.metadata:
        if raw:
            raise SessionError("the session holds a conversation, not plain text: leave --raw out, or start another")
        return Conversation(session, system)
    if not (begun or raw) and has_template(session.model):
        return Conversation(session, system)
    if system is not None:
        refuse_turns("--system", session.model, raw, begun)
    return None


def refuse_turns(name: str, model: Model, raw: bool, begun: bool = False) -> NoReturn:
    """Raise PromptError for an option that belongs to a chat template, where there is none."""
    why = f"the model {model.bundle.manifest.name} has no chat template"
    if begun:
        why = "the session holds plain text"
    if raw:
        why = "--raw leaves out the chat template"
    raise PromptError(f"{why}, and with it there are no turns for {name}: leave {name} out")
