"""Where questions and texts come from: an argument, a file, stdin, or the keyboard."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from kvq.runtime.errors import PromptError
from kvq.runtime.files import bounded, read_bounded

# Of stdin that stays open without a word, before the user is told what is waited for.
SECONDS_OF_SILENCE = 3
MOST_TEXT = 1 << 26  # bytes of a text or a file that says what to do: far more than any context holds
EMPTY = 'the prompt is empty: give it as an argument ("Once upon a time"), with --file, or on stdin'


def read_prompt(argument: str | None, file: Path | None) -> str:
    """A text from file or stdin, followed by the argument; stdin is read only if nothing else is given.

    Raises:
        PromptError: nothing given, unreadable, empty, or not UTF-8.
    """
    text = "\n".join(prompt_parts(argument, file, joined=False))
    if not text:
        raise PromptError(EMPTY)
    return text


def prompt_parts(
    argument: str | None, file: Path | None, joined: bool, say: Callable[[str], None] | None = None
) -> list[str]:
    """What stdin, the file and the argument hold, in this order, without the line ends behind; blank ones left out.

    Args:
        argument, file: None where not given; the file "-" is stdin.
        joined: whether stdin is read besides them too, unless it is a terminal.
        say: told if that takes long.

    Raises:
        PromptError: unreadable or not UTF-8.
    """
    parts = []
    named = argument is not None or file is not None
    if str(file) == "-" or ((joined or not named) and not sys.stdin.isatty()):
        parts.append(_utf8(_stdin(optional=named and str(file) != "-", say=say), "stdin"))
    if file is not None and str(file) != "-":
        try:
            parts.append(_utf8(read_bounded(file, MOST_TEXT), str(file)))
        except OSError as error:
            remedy = "give less" if error.errno == errno.EFBIG else "check the path"
            raise PromptError(f"cannot read {file}: {error.strerror}; {remedy}") from None
    if argument is not None:
        parts.append(argument_text(argument, "the prompt"))
    return [part.rstrip("\n") for part in parts if part.strip()]


def _stdin(optional: bool, say: Callable[[str], None] | None) -> bytes:
    """All of stdin; where it is optional, one that cannot be read, as nohup leaves it, is none."""
    if optional and say and sys.platform != "win32":  # where select knows sockets only
        try:
            if not select.select([sys.stdin], [], [], SECONDS_OF_SILENCE)[0]:
                say("kvq: waiting for the end of stdin, which goes before the prompt; </dev/null gives it none")
        except (OSError, ValueError):  # no file behind it
            pass
    try:
        return bounded(sys.stdin.buffer, MOST_TEXT)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise PromptError(f"cannot read stdin: {error.strerror}; give less") from None
        if not optional or error.errno != errno.EBADF:
            raise
        return b""


def argument_text(argument: str, what: str) -> str:
    """An argument, in whatever locale; undecodable bytes arrive as surrogates."""
    return _utf8(os.fsencode(argument), what)


def _utf8(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8") from None
