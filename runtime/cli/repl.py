"""A chat at work: lines that are questions, and lines that are commands."""

from __future__ import annotations

import shlex
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.answers import Answer, show, why_empty
from kvq.runtime.cli.commands import Toolbox, ToolCommand, arguments_of, response
from kvq.runtime.cli.interrupt import Interrupt
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
SPARE = 4  # a reply finds a part of the context free, that of one in so many, or what it may have if that is less


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
        forgotten: turns that had to make room.
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
    forgotten: int = 0

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
        self.forgotten = 0

    def told(self, system: str | None) -> str | None:
        """The system prompt, with the tools in it."""
        return system if self.tools is None else self.tools.system(self.model.chat_template, system)

    def notice(self, text: str) -> None:
        """A line on stderr, unless --quiet."""
        if not self.quiet:
            click.echo(text, err=True)

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
        self._make_room(question)
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
            told = response([self._run(command, text) for command, text in calls])
            self._make_room(told)
            answer = self._show(self.generation, told)
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
            options = {**generation, "cancelled": lambda: interrupt.asked, "progress": bar}
            conversation = self.conversation
            replies = (
                conversation.regenerate(**options) if question is None else conversation.reply(question, **options)
            )
            answer = show(self._going_on(replies, generation), bar, interrupt, strip=True)
        if answer.last is None:  # stopped while the question was read
            click.echo()
        self._say_how_it_ended(answer, interrupt.asked)
        return answer

    def _going_on(self, replies: Any, generation: dict[str, Any]) -> Any:
        """Responses of a reply; one that has filled the context goes on once the oldest turns are gone."""
        most, before = generation["max_tokens"], 0
        while True:
            last: Response | None = None
            try:
                for last in replies:
                    full = last.finish_reason == "context" and len(self.conversation.turns) > 1
                    if not full:
                        yield last if not before else _counted(last, before)
            finally:
                replies.close()
            if last is None or last.finish_reason != "context" or len(self.conversation.turns) < 2:
                return
            before += last.index + 1
            left = None if most is None else most - before
            if not self._forget(self.model.architecture.context // 2) or (left is not None and left < 1):
                yield _counted(last, before - last.index - 1)
                return
            yield _counted(last, before - last.index - 1, finish=None)
            replies = self.conversation.resume(**{**generation, "max_tokens": left})

    def _make_room(self, question: str) -> None:
        """Drop the oldest turns where a question and its answer would not fit."""
        conversation, context = self.conversation, self.model.architecture.context
        most = self.generation["max_tokens"]
        reserve = context // SPARE if most is None else min(most, context // SPARE)
        need = len(conversation.template.encode([{"role": "user", "content": question}])) + reserve
        if conversation.session.room < need:
            # Half the context at once, so that turns are not processed again with every question.
            self._forget(max(need, min(context // 2, context - 1)))

    def _forget(self, room: int) -> int:
        gone = self.conversation.forget(room)
        if gone:
            self.forgotten += gone
            turns = f"the oldest {gone} turns are" if gone > 1 else "the oldest turn is"
            self.notice(f"(the context of {self.model.architecture.context} tokens is full: {turns} forgotten)")
        return gone

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


def _counted(response: Response, before: int, finish: str | None = "") -> Response:
    """A response of a reply that has said so many tokens before; finish: in place of its own."""
    from dataclasses import replace

    reason = response.finish_reason if finish == "" else finish
    return replace(response, index=response.index + before, finish_reason=reason)
