"""A chat at work: lines that are questions, and lines that are commands."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.answers import Answer, show, why_empty
from kvq.runtime.cli.commands import Toolbox, ToolCommand, arguments_of, response
from kvq.runtime.cli.interrupt import Interrupt, Leaving
from kvq.runtime.cli.keyboard import QUOTES, prepare_readline, typed
from kvq.runtime.cli.progress import Bar
from kvq.runtime.cli.slash import HELP, Commands
from kvq.runtime.errors import KvqError, PromptError
from kvq.runtime.text.cells import visible

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation
    from kvq.runtime.session.generation import Response
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

MOST_ROUNDS = 8  # of commands for one question


@dataclass
class Repl:
    """A running chat.

    Attributes:
        settings: of `Model.session`, for every session of this chat.
        system: system prompt.
        generation: options of `Conversation.reply`.
        quiet: whether notices are left out.
        history: whether what is typed is kept on disk.
        tools: commands that the model may ask for.
        attended: whether somebody is there whose Ctrl-C ends an answer alone.
        leaving: ends the chat where the process is told to end.
    """

    model: Model
    settings: dict[str, Any]
    system: str | None
    generation: dict[str, Any]
    quiet: bool
    history: bool = True
    tools: Toolbox | None = None
    conversation: Conversation = field(init=False)
    attended: bool = False
    leaving: Leaving = field(default_factory=Leaving)

    def __post_init__(self) -> None:
        self._commands = Commands(self)
        self._again = 0  # how often the last question has been answered again
        self.begin(self.new_session())
        self.conversation.session.generate([0], **self.generation)  # checks the options now, and computes nothing

    def new_session(self) -> Session:
        """An empty session with this chat's settings."""
        return self.model.session(**self.settings)

    def begin(self, session: Session, system: bool = True) -> None:
        """Start or take up the conversation of a session."""
        from kvq.runtime.chat.conversation import Conversation

        fresh = system and (self.system is not None or not session.tokens)  # else the session's own
        conversation = Conversation(session, self.told(self.system) if fresh else None)
        said = conversation.messages[0]["content"] if conversation.messages else ""
        if self.tools is not None and not self.tools.known(said):
            raise PromptError("this conversation was begun without these tools; begin a new one, or leave --tools out")
        self.conversation = conversation

    def told(self, system: str | None) -> str | None:
        """The system prompt, with the tools in it."""
        return system if self.tools is None else self.tools.system(self.model.chat_template, system)

    def notice(self, text: str) -> None:
        """A line on stderr, unless --quiet. Names of files and of tokens in it must not steer the terminal."""
        if not self.quiet:
            click.echo(visible(text), err=True)

    # -- where lines come from ----------------------------------------------------------------------

    def script(self, first: str | None = None) -> None:
        """A first question, and one a line from stdin, or from three quotes to three more; the first error ends it."""
        if first:
            self.answer(first)
        quoted: list[str] | None = None
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise PromptError(f"line {number} of stdin is not UTF-8; convert it with iconv -t UTF-8") from None
            if quoted is None and text.lstrip().startswith(QUOTES):
                quoted, text = [], text.lstrip().removeprefix(QUOTES)
            if quoted is not None:
                before, closed, _ = text.partition(QUOTES)
                quoted.append(before)
                if not closed:
                    continue
                text, quoted = "".join(quoted), None
            if not self.handle(text.strip()):
                return
        if quoted is not None and not self.handle("".join(quoted).strip()):  # nobody has closed them
            return

    def interactive(self, first: str | None = None) -> None:
        """A first question, and those from the terminal until Ctrl-D; an error is told and the chat goes on."""
        commands = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
        history = prepare_readline(commands, self.history)
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
                    continue
                line = typed().strip()
                if history is not None:
                    history.add(line)
                if not self.handle(line):
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
        return self._commands.run(line)

    # -- answers ------------------------------------------------------------------------------------

    def answer(self, question: str) -> None:
        """Stream an answer to stdout; where the context is full, the oldest turns go."""
        self._again = 0
        self._with_tools(self._show(self.generation, question))

    def regenerate(self) -> None:
        """Answer the last question again, with other draws."""
        self._again += 1
        seed = self.generation.get("seed")
        self._with_tools(self._show({**self.generation, "seed": None if seed is None else seed + self._again}, None))

    def _with_tools(self, answer: Answer) -> None:
        """Run the commands that an answer asks for, if they are confirmed, and have it go on with what they say."""
        for _ in range(MOST_ROUNDS):
            calls = self.tools.calls(answer.text) if self.tools is not None and answer.finish_reason == "stop" else []
            if not calls:
                return
            answer = self._show(self.generation, response([self._run(command, text) for command, text in calls]))
        self.notice(f"({MOST_ROUNDS} rounds of commands; ask again to go on)")

    def _run(self, command: ToolCommand, text: str) -> str:
        """What a command says; what keeps it from running, otherwise."""
        try:
            argv = command.argv(arguments_of(text))
        except PromptError as error:
            self.notice(f"({error})")
            return f"error: {error}"
        shown = visible(shlex.join(argv))
        if not self.attended:
            self.notice(f"(not run, since nobody is there to confirm it: {shown})")
            return "error: the user was not there to allow it"
        if not click.confirm(f"run {shown} ?", default=False, err=True):
            return "error: the user did not allow it"
        return command.run(argv)

    def _show(self, generation: dict[str, Any], question: str | None) -> Answer:
        """The answer to a question, or with None the last one again."""
        bar = Bar(shown=not self.quiet)
        with Interrupt(enabled=self.attended) as interrupt:
            interrupt.arm()
            options = {**generation, "cancelled": lambda: interrupt.asked, "progress": bar, "context_shift": True}
            if options["max_tokens"] is None:  # an answer that would never end by itself ends then
                options["max_tokens"] = self.model.architecture.context
            with self.leaving.after(interrupt):
                answer = show(self._making_room(question, options), bar, interrupt, strip=True)
        if answer.last is None:  # stopped while the question was read
            click.echo()
        self._say_how_it_ended(answer, interrupt.asked)
        return answer

    def _making_room(self, question: str | None, options: dict[str, Any]) -> Iterator[Response]:
        """The responses of a reply; what had to make room for them is said."""
        talk, context = self.conversation, self.model.architecture.context
        replies = talk.regenerate if question is None else partial(talk.reply, question)
        forgotten, lost = talk.forgotten, 0
        responses = replies(**options)
        try:
            for response in responses:
                full = f"(the context of {context} tokens is full: "
                if gone := talk.forgotten - forgotten:
                    self.notice(f"{full}the oldest {f'{gone} turns are' if gone > 1 else 'turn is'} forgotten)")
                if talk.lost and not lost:
                    self.notice(f"{full}the beginning of this answer is forgotten)")
                forgotten, lost = talk.forgotten, talk.lost
                yield response
        finally:
            responses.close()

    def _say_how_it_ended(self, answer: Answer, stopped: bool) -> None:
        empty = why_empty(answer.text, answer.last, self.model, self.conversation.template, self.generation)
        if stopped:
            self.notice("(stopped)")
        elif empty and answer.finish_reason == "stop":
            self.notice(f"({empty})")
        elif answer.finish_reason == "length":
            self.notice(f"(cut after {answer.tokens} tokens; -n or /set max_tokens says how many)")
        elif answer.finish_reason == "context":
            self.notice(
                f"(the context of {self.model.architecture.context} tokens is full: /undo takes back a turn,"
                " /reset begins anew)"
            )
