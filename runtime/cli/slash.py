"""What can be typed in a chat besides questions: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.chat.documents import BREAK
from kvq.runtime.errors import BudgetError, PromptError, SamplingError
from kvq.runtime.session.sampling import DEFAULTS

if TYPE_CHECKING:
    from kvq.runtime.cli.repl import Repl

HELP = """\
/save FILE       save the conversation with its cache, to go on later
/load FILE       go on with a saved one
/policy NAME     another precision of cached tokens; the conversation is processed again
/system [TEXT]   another system prompt, or none; the conversation is processed again
/set [NAME X]    show options of sampling, or set one: temperature, top_p, seed, max_tokens, ...
/regenerate      answer the last question again
/edit            change the last question in $EDITOR, and have it answered
/undo            take back the last question and its answer
/context         how full the context is
/stats           tokens, bytes and times so far
/reset           begin anew; --system stays, a document does not
/quit            end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one, pasted lines are one question, and so are
those between \"\"\" and \"\"\". Where the context is full the oldest turns are forgotten, and it is said."""
SETTABLE = (*DEFAULTS, "max_tokens")


class Commands:
    """The commands of a chat.

    Args:
        repl: the chat.
    """

    def __init__(self, repl: Repl) -> None:
        self._repl = repl
        # Name -> least and most arguments, and what it does; None takes the rest of the line as it is.
        self._known: dict[str, tuple[int, int | None, Callable[..., None]]] = {
            "help": (0, 0, self.help), "save": (1, 1, self.save), "load": (1, 1, self.load),
            "policy": (1, 1, self.policy), "stats": (0, 0, self.stats), "undo": (0, 0, self.undo),
            "reset": (0, 0, self.reset), "system": (0, None, self.system), "set": (0, 2, self.set),
            "regenerate": (0, 0, repl.regenerate), "edit": (0, 0, self.edit), "context": (0, 0, self.context),
        }  # fmt: skip

    def run(self, line: str) -> bool:
        """Do what a line says; False ends the chat.

        Raises:
            PromptError: no such command, or other arguments.
        """
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit", "bye"):
            return False
        command = self._known.get(name)
        if command is None and "/" in name:  # a path, which a question may begin with
            self._repl.answer(line)
            return True
        if command is None:
            near = difflib.get_close_matches(name, self._known, 1)
            raise PromptError(
                f"no command /{name:.40}; " + (f"did you mean /{near[0]}?" if near else "/help lists them")
            )
        least, most, function = command
        if most is None:
            function(rest.strip())
            return True
        try:
            arguments = shlex.split(rest)
        except ValueError as error:
            raise PromptError(f"{line!r:.80} cannot be read ({error}); close its quotes") from None
        if not least <= len(arguments) <= most:
            raise PromptError(f"/{name} takes {most or 'no'} argument{'s' * (most != 1)}; see /help")
        function(*arguments)
        return True

    def help(self) -> None:
        """What can be typed."""
        click.echo(HELP, err=True)

    def save(self, path: str) -> None:
        """Write the session, conversation included."""
        session = self._repl.conversation.session
        session.save(path)
        nbytes = Path(path).stat().st_size
        self._repl.notice(f"saved {len(session.tokens)} tokens to {path}, {nbytes / 1e3:.1f} kB")

    def load(self, path: str) -> None:
        """Take up a saved session."""
        session = self._repl.model.load_session(path)
        self._repl.begin(session, system=False)
        self._repl.notice(f"{self._turns()}, {len(session.tokens)} tokens, policy {session.policy.name}")

    def policy(self, name: str) -> None:
        """Process the conversation again under another policy."""
        repl = self._repl
        settings, left = {**repl.settings, "policy": name}, ""
        try:
            session = repl.model.session(**settings)
        except BudgetError:  # one that this policy cannot follow
            settings |= {"kv_bits": None, "kv_memory": None}
            session, left = repl.model.session(**settings), ", without the budget"
        repl.conversation.move_to(session)
        repl.settings = settings
        repl.notice(f"policy {session.policy.name}{left}, {len(session.tokens)} tokens processed again")

    def system(self, text: str) -> None:
        """Another system prompt."""
        repl = self._repl
        repl.conversation.set_system(repl.told(text or None))
        repl.system = text or None
        repl.notice("a new system prompt" if text else "no system prompt")

    def edit(self) -> None:
        """The last question once more, as it comes out of the user's editor."""
        repl = self._repl
        conversation = repl.conversation
        if not conversation.turns:
            raise PromptError("nothing to edit: the conversation has no turns yet")
        question = conversation.messages[-2]["content"][conversation.turns[-1].document :].removeprefix(BREAK)
        try:
            edited = click.edit(question, require_save=True, extension=".txt")
        except click.ClickException as error:
            raise PromptError(f"{error.format_message()}; set EDITOR to one that works") from None
        edited = (edited or "").strip()
        if not edited or edited == question.strip():
            repl.notice("nothing changed")
            return
        conversation.undo()
        repl.answer(edited)

    def set(self, name: str = "", value: str = "") -> None:
        """Show options, or set one."""
        repl = self._repl
        if not name:
            shown = {**repl.model.sampling, **repl.generation}
            click.echo(", ".join(f"{key} {shown[key]}" for key in SETTABLE if key in shown), err=True)
            return
        name = name.replace("-", "_")
        if name not in SETTABLE:
            near = difflib.get_close_matches(name, SETTABLE, 1)
            raise SamplingError(
                f"there is no option {name:.40} to set; " + (f"did you mean {near[0]}?" if near else "/set shows them")
            )
        changed = {**repl.generation, name: _value(name, value)}
        repl.new_session().generate([0], **changed)  # refuses what is out of range, and computes nothing
        repl.generation = changed
        repl.notice(f"{name} {changed[name]}")

    def context(self) -> None:
        """How full the context is, asked for and so printed even if quiet."""
        session, context = self._repl.conversation.session, self._repl.model.architecture.context
        held = len(session.tokens) + len(session.pending)
        gone = f", {forgotten} forgotten" if (forgotten := self._repl.conversation.forgotten) else ""
        click.echo(f"{held} of {context} tokens ({held / context:.0%}), {self._turns()}{gone}", err=True)

    def stats(self) -> None:
        """The line of statistics, asked for and so printed even if quiet."""
        click.echo(self._repl.conversation.session.stats().line(), err=True)

    def undo(self) -> None:
        """Take back a turn."""
        self._repl.conversation.undo()
        self._repl.notice(f"{self._turns()}, {len(self._repl.conversation.session.tokens)} tokens left")

    def _turns(self) -> str:
        conversation = self._repl.conversation
        turns = len(conversation.turns)
        return f"{turns} turn{'s' * (turns != 1)}" + " and a document" * (conversation.document is not None)

    def reset(self) -> None:
        """Begin anew."""
        self._repl.begin(self._repl.new_session())
        self._repl.notice("a new conversation")


def _value(name: str, text: str) -> Any:
    """The value of an option as it was typed."""
    if text in ("", "none", "off") and DEFAULTS.get(name, 0) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise SamplingError(f"{name} cannot be {text!r:.40}; give a number") from None
    if name == "max_tokens" and value == -1:
        return None
    if name == "logit_bias" and isinstance(value, dict):
        return {int(token) if token.isdecimal() else token: number for token, number in value.items()}
    return value
