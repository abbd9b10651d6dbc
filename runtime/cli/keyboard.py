"""Questions from the keyboard: line editing, pasted text, several lines in one, and what was typed before."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from kvq.runtime.bundle.fields import encodable
from kvq.runtime.catalog.home import home
from kvq.runtime.files import atomic_file, read_regular

HISTORY = "history"  # in KVQ_HOME
MOST_LINES = 1000  # of the history
MOST_CHARACTERS = 4000  # of one that is kept
QUOTES = '"""'


def typed() -> str:
    """A question from the terminal; the prompt is not part of what stdout carries when it goes elsewhere.

    A line that ends in a backslash goes on in the next one, and one that begins with three quotes until three more.
    """
    lines: list[str] = []
    quoted = False
    while True:
        line = _line("> " if not lines else ". ")
        if not lines and line.lstrip().startswith(QUOTES):
            quoted, line = True, line.lstrip().removeprefix(QUOTES)
        if quoted:
            before, closed, _ = line.partition(QUOTES)
            lines.append(before)
            if closed:
                return "\n".join(lines).strip("\n")
        else:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)


def _line(prompt: str) -> str:
    """One line, or what was pasted at once."""
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)
    await_line()
    return input()


def await_line() -> None:
    """Returns when stdin can be read.

    Looks up now and then: a Ctrl-C that comes just before a read that blocks would be noticed only with the next line.
    """
    if sys.platform != "win32":  # where select knows sockets only
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            pass


def prepare_readline(commands: Sequence[str], keep: bool = True) -> History | None:
    """Line editing, completion of commands, pasted lines as one, and the history; None where Python has no readline.

    keep: the history on disk; without, there is that of this run, by readline itself.
    """
    try:
        import readline
    except ImportError:
        return None

    def complete(text: str, state: int) -> str | None:
        found = [name + " " for name in commands if name.startswith(text)] if text.startswith("/") else []
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    if not libedit:  # Python switches it off: a program has to expect lines that hold several
        readline.parse_and_bind("set enable-bracketed-paste on")
    if not keep:
        return None
    history = History(home() / HISTORY)
    readline.set_auto_history(False)  # a question of several lines is one entry
    readline.clear_history()
    for entry in history.entries():
        readline.add_history(entry)
    history.add_to = readline.add_history
    return history


class History:
    """What was typed, one JSON string a line in a file that its user alone can read.

    Args:
        path: of the file.

    Attributes:
        add_to: told each new entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.add_to = lambda entry: None

    def entries(self) -> list[str]:
        """The last ones, oldest first; nothing of a file that cannot be read."""
        try:
            lines = read_regular(self.path, MOST_LINES * MOST_CHARACTERS).decode(errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines[-MOST_LINES:]:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, str) and entry and "\0" not in entry and encodable(entry):
                    found.append(entry)
        return found

    def add(self, entry: str) -> None:
        """Keep what was typed; where it cannot be kept on disk, for this run."""
        if not entry.strip() or len(entry) > MOST_CHARACTERS or "\0" in entry or not encodable(entry):
            return
        self.add_to(entry)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = self.entries()
            if len(kept) >= MOST_LINES and self.path.stat().st_size > MOST_LINES * MOST_CHARACTERS // 2:
                with atomic_file(self.path, private=True) as file:  # whoever is killed here has the old history
                    file.writelines(map(_line_of, kept[-MOST_LINES // 2 :]))
            self._append(_line_of(entry))

    def _append(self, line: bytes) -> None:
        # Without waiting: a pipe that nobody reads would hold the chat up.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(self.path, flags, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def _line_of(entry: str) -> bytes:
    return json.dumps(entry).encode() + b"\n"
