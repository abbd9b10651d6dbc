"""``kvq prefill``: read a text once, into a session file that can be asked many questions."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from kvq.runtime.cli.loading import load_model
from kvq.runtime.cli.options import (
    CACHE,
    MODEL,
    OUTPUT,
    RAW,
    SETTINGS,
    SYSTEM,
    Command,
    given,
    option,
    options,
    session_settings,
)
from kvq.runtime.cli.progress import Bar
from kvq.runtime.cli.questions import read_prompt
from kvq.runtime.cli.sessions import refuse_turns
from kvq.runtime.errors import SessionError, one_line


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "-o",
    "--out",
    required=True,
    **OUTPUT,
    metavar="SESSION",
    section="Basics",
    help="The session file to make.",
)
@option("--overwrite", is_flag=True, section="Basics", help="Replace an existing file.")
@option(
    "--as",
    "role",
    type=click.Choice(["user", "system"]),
    metavar="WHOSE",
    section="Basics",
    help="Whose turn the text is in: the system's, where models find more again, or the user's, before the question; "
    "if not given the system's, where the template has one.",
)
@options([SYSTEM, RAW])
@option("-q", "--quiet", is_flag=True, section="Basics", help="No progress, no statistics line.")
@options(MODEL)
@options(CACHE)
@click.pass_context
def prefill(
    ctx, file, out, overwrite, role, system, raw, quiet, model, threads, **parameters
) -> None:  # fmt: skip
    """Read the text FILE (- is stdin) and keep what the model has made of it in a session file.

    With a model that has a chat template the text is in the turn of the system, or
    is the beginning of the user's and the next question its end; else, or with
    --raw, it is text to go on with.

    \b
    Examples:
      kvq prefill lease.txt -o lease.kvq
      kvq-run --session lease.kvq --session-readonly "When is the rent due?"
      kvq chat --session lease.kvq
      kvq prefill letter.txt -o letter.kvq --as user
      kvq prefill chapter.txt -o chapter.kvq --raw
    """
    from kvq.runtime.chat.conversation import Conversation, has_template

    if os.path.lexists(out) and not overwrite:
        raise SessionError(f"{out} exists already; choose another name or pass --overwrite")
    text = read_prompt(None, file)
    loaded = load_model(model, threads)
    session = loaded.session(**session_settings(parameters))
    turns = has_template(loaded) and not raw
    if not turns and system is not None:
        refuse_turns("--system", loaded, raw)
    if not turns and "role" in given(ctx):
        refuse_turns("--as", loaded, raw)
    begun, bar = time.perf_counter(), Bar(shown=not quiet)
    try:
        if turns:
            role = role or ("system" if loaded.chat_template.takes_system else "user")
            Conversation(session, system).read(text, role, progress=bar)
        else:
            session.append(loaded.encode(text), progress=bar)
    finally:
        bar.clear()
    seconds = time.perf_counter() - begun
    session.save(out, overwrite)
    if not quiet:
        held, stats = f"in the turn of the {role}" if turns else "plain text", session.stats().line()
        line = f"{out}: {out.stat().st_size / 1e3:.1f} kB, {held}, read in {seconds:.2f} s | {stats}"
        click.echo(one_line(line), err=True)
