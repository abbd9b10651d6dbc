"""A chat at work: lines that are questions, and lines that are commands."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.answers import show, why_empty
from kvq.runtime.cli.interrupt import Interrupt
from kvq.runtime.cli.progress import Bar
from kvq.runtime.cli.questions import prepare_readline, typed
from kvq.runtime.errors import BudgetError, KvqError, PromptError

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

HELP = """\
/save FILE    save the conversation with its cache, to go on later
/load FILE    go on with a saved one
/policy NAME  another precision of cached tokens; the conversation is processed again
/stats        tokens, bytes and times so far
/undo         take back the last question and its answer
/reset        begin anew; --system stays, a document does not
/quit         end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""


@dataclass
class Repl:
    """A running chat.

    Attributes:
        settings: of `Model.session`, for every session of this chat.
        system: system prompt.
        generation: options of `Conversation.reply`.
        quiet: whether notices are left out.
        attended: whether somebody is there whose Ctrl-C ends an answer alone.
    """

    model: Model
    settings: dict[str, Any]
    system: str | None
    generation: dict[str, Any]
    quiet: bool
    conversation: Conversation = field(init=False)
    attended: bool = False

    def __post_init__(self) -> None:
        self.begin(self.new_session())
        self.conversation.session.generate([0], **self.generation)  # checks the options now, and computes nothing

    def new_session(self) -> Session:
        """An empty session with this chat's settings."""
        return self.model.session(**self.settings)

    def begin(self, session: Session, system: bool = True) -> None:
        """Start or take up the conversation of a session."""
        from kvq.runtime.chat.conversation import Conversation

        self.conversation = Conversation(session, self.system if system else None)

    def notice(self, text: str) -> None:
        """A line on stderr, unless --quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    def script(self, first: str | None = None) -> None:
        """A first question, and one a line from stdin; the first error ends it."""
        if first:
            self.answer(first)
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise PromptError(f"line {number} of stdin is not UTF-8; convert it with iconv -t UTF-8") from None
            if not self.handle(text.strip()):
                return

    def interactive(self, first: str | None = None) -> None:
        """A first question, and those from the terminal until Ctrl-D; an error is told and the chat goes on."""
        prepare_readline([line.split()[0] for line in HELP.splitlines() if line.startswith("/")])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have it ignored
        self.attended = True
        session = self.conversation.session
        template = "plain transcript: this model has no chat template" if self.conversation.template.builtin else "chat"
        self.notice(
            f"{self.model.bundle.manifest.name} | policy {session.policy.name} | {template} | /help lists commands"
        )
        while True:
            try:
                if first:
                    question, first = first, None
                    self.answer(question)
                elif not self.handle(typed().strip()):
                    return
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /quit ends the chat)", err=True)
            except (KvqError, OSError) as error:
                click.echo(f"kvq: {error}", err=True)

    def handle(self, line: str) -> bool:
        """Answer a line or do what it says; False ends the chat."""
        if not line.startswith("/"):
            if line:
                self.answer(line)
            return True
        try:
            name, *arguments = shlex.split(line[1:]) or [""]
        except ValueError as error:
            raise PromptError(f"{line!r:.80} cannot be read ({error}); close its quotes") from None
        if name in ("quit", "exit", "bye"):
            return False
        commands: dict[str, tuple[int, Callable[..., None]]] = {
            "help": (0, self.help), "save": (1, self.save), "load": (1, self.load), "policy": (1, self.policy),
            "stats": (0, self.stats), "undo": (0, self.undo), "reset": (0, self.reset),
        }  # fmt: skip
        command = commands.get(name)
        if command is None and "/" in name:  # a path, which a question may begin with
            self.answer(line)
            return True
        if command is None:
            raise PromptError(f"no command /{name}; /help lists them")
        if len(arguments) != command[0]:
            raise PromptError(f"/{name} takes {command[0] or 'no'} argument{'s' * (command[0] != 1)}; see /help")
        command[1](*arguments)
        return True

    def answer(self, question: str) -> None:
        """Stream an answer to stdout."""
        bar = Bar(shown=not self.quiet)
        with Interrupt(enabled=self.attended) as interrupt:
            interrupt.arm()
            replies = self.conversation.reply(
                question, cancelled=lambda: interrupt.asked, progress=bar, **self.generation
            )
            answer = show(replies, bar, interrupt, strip=True)
        if answer.last is None:  # stopped while the question was read
            click.echo()
        empty = why_empty(answer.text, answer.last, self.model, self.conversation.template, self.generation)
        if interrupt.asked:
            self.notice("(stopped)")
        elif empty and answer.finish_reason == "stop":
            self.notice(f"({empty})")
        elif answer.finish_reason == "length":
            self.notice(f"(cut after {self.generation['max_tokens']} tokens; -n sets how many)")
        elif answer.finish_reason == "context":
            self.notice(
                f"(the context of {self.model.architecture.context} tokens is full: /undo takes back a turn,"
                " /reset begins anew)"
            )

    def help(self) -> None:
        """What can be typed."""
        click.echo(HELP, err=True)

    def save(self, path: str) -> None:
        """Write the session, conversation included."""
        self.conversation.session.save(path)
        session = self.conversation.session
        self.notice(f"saved {len(session.tokens)} tokens to {path}, {Path(path).stat().st_size / 1e3:.1f} kB")

    def load(self, path: str) -> None:
        """Take up a saved session."""
        session = self.model.load_session(path)
        self.begin(session, system=False)
        self.notice(f"{self._turns()}, {len(session.tokens)} tokens, policy {session.policy.name}")

    def policy(self, name: str) -> None:
        """Process the conversation again under another policy."""
        settings, left = {**self.settings, "policy": name}, ""
        try:
            session = self.model.session(**settings)
        except BudgetError:  # one that this policy cannot follow
            settings |= {"kv_bits": None, "kv_memory": None}
            session, left = self.model.session(**settings), ", without the budget"
        self.conversation.move_to(session)
        self.settings = settings
        self.notice(f"policy {session.policy.name}{left}, {len(session.tokens)} tokens processed again")

    def stats(self) -> None:
        """The line of statistics, asked for and so printed even if quiet."""
        click.echo(self.conversation.session.stats().line(), err=True)

    def undo(self) -> None:
        """Take back a turn."""
        self.conversation.undo()
        self.notice(f"{self._turns()}, {len(self.conversation.session.tokens)} tokens left")

    def _turns(self) -> str:
        turns = len(self.conversation.turns)
        return f"{turns} turn{'s' * (turns != 1)}" + " and a document" * (self.conversation.document is not None)

    def reset(self) -> None:
        """Begin anew."""
        self.begin(self.new_session())
        self.notice("a new conversation")
