"""``kvq chat``: a conversation in the terminal; answers to stdout, everything else to stderr."""

from __future__ import annotations

import select
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.answers import Bar, why_empty
from kvq.runtime.cli.options import (
    CACHE,
    MODEL,
    SAMPLING,
    SETTINGS,
    SYSTEM,
    Command,
    given,
    load_model,
    max_tokens,
    option,
    options,
)  # fmt: skip
from kvq.runtime.cli.run import argument_text
from kvq.runtime.cli.sessions import SESSION, SessionFile
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


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("question", required=False)
@options([SYSTEM, *SESSION])
@option("-q", "--quiet", is_flag=True, section="Basics", help="No notices, only answers and errors.")
@options(MODEL)
@options(CACHE)
@options([max_tokens(512), *SAMPLING[1:]])
@click.pass_context
def chat(
    ctx, question, system, session_file, session_readonly, quiet, model, threads, policy, kv_bits, kv_memory, recent,
    sink, prefill, backend, max_tokens, **generation,
) -> None:  # fmt: skip
    """Talk with a model; /help lists what you can type besides.

    QUESTION is asked first, where it is given. Every question is added to the
    cache, so earlier turns are never processed again. Without a terminal, each
    line of stdin is one question.

    \b
    Examples:
      kvq chat -m smollm2-360m-instruct --kv-bits 4
      kvq chat -m smollm2-360m-instruct "What can I cook from rice and eggs?"
      kvq chat -m ./my-bundle --system "Answer in one sentence."
      kvq chat --session talk.kvq
      printf 'Who wrote Emma?\\nWhen was she born?\\n' | kvq chat -m ./my-bundle -q
    """
    first = None if question is None else argument_text(question, "the question").strip()
    if first == "":
        raise PromptError("the question is empty: give some text, or none to be asked for it")
    settings = {
        "policy": policy, "recent": recent, "sink": sink, "prefill": prefill, "backend": backend,
        "kv_bits": kv_bits, "kv_memory": kv_memory,
    }  # fmt: skip
    generation["max_tokens"] = None if max_tokens == -1 else max_tokens
    kept = SessionFile.of(session_file, session_readonly)
    loaded = load_model(model, threads)
    repl = Repl(loaded, settings, system, generation, quiet)
    if kept is not None and kept.exists:
        repl.begin(kept.open(loaded, settings, given(ctx)))
    if kept is not None:
        repl.notice(kept.opened(repl.conversation.session, repl.conversation))
    try:
        repl.interactive(first) if sys.stdin.isatty() else repl.script(first)
    finally:
        if kept is not None and not isinstance(sys.exception(), KeyboardInterrupt):
            kept.close(repl.conversation.session)
            repl.notice(kept.closed(repl.conversation.session))


@dataclass
class Repl:
    """A running chat.

    Attributes:
        settings: of `Model.session`, for every session of this chat.
        system: system prompt.
        generation: options of `Conversation.reply`.
        quiet: whether notices are left out.
        stopping: whether Ctrl-C was pressed during an answer.
        answering: whether an answer is on its way.
    """

    model: Model
    settings: dict[str, Any]
    system: str | None
    generation: dict[str, Any]
    quiet: bool
    conversation: Conversation = field(init=False)
    stopping: bool = False
    answering: bool = False

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
        prepare_readline()
        signal.signal(signal.SIGINT, self._interrupt)
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
                elif not self.handle(ask().strip()):
                    return
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /quit ends the chat)", err=True)
            except (KvqError, OSError) as error:
                click.echo(f"kvq: {error}", err=True)

    def _interrupt(self, *_: object) -> None:
        # A forward pass must not be cut in the middle: an answer is stopped between its tokens.
        if not self.answering or self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

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
        self.stopping, begun, reason = False, False, None
        bar, last = Bar(shown=not self.quiet), None
        replies = self.conversation.reply(question, cancelled=lambda: self.stopping, progress=bar, **self.generation)
        self.answering = True
        try:
            for last in replies:
                bar.clear()
                text = last.text if begun else last.text.lstrip()
                if text:
                    begun = True
                    click.echo(text, nl=False)
                    sys.stdout.flush()
                reason = last.finish_reason
                if self.stopping:
                    break
        finally:
            bar.clear()
            replies.close()  # type: ignore[attr-defined] # a generator: ends its turn
            self.answering = False
            click.echo()
        empty = why_empty("." if begun else "", last, self.model, self.conversation.template, self.generation)
        if self.stopping:
            self.notice("(stopped)")
        elif empty and reason == "stop":
            self.notice(f"({empty})")
        elif reason == "length":
            self.notice(f"(cut after {self.generation['max_tokens']} tokens; -n sets how many)")
        elif reason == "context":
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


def ask() -> str:
    """A question from the terminal; the prompt is not part of what stdout carries when it goes elsewhere."""
    lines, prompt = [], "> "
    while True:
        if sys.stdout.isatty():
            line = input(prompt)
        else:
            click.echo(prompt, nl=False, err=True)
            await_line()
            line = input()
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)
        prompt = ". "


def await_line() -> None:
    """Returns when stdin can be read.

    Looks up now and then: a Ctrl-C that comes just before a read that blocks would be noticed only with the next line.
    """
    if sys.platform != "win32":  # where select knows sockets only
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            pass


def prepare_readline() -> None:
    """Line editing, and completion of commands and file names; nothing where Python has no readline."""
    try:
        import readline
    except ImportError:
        return
    commands = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]

    def complete(text: str, state: int) -> str | None:
        found = [name + " " for name in commands if name.startswith(text)] if text.startswith("/") else []
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
