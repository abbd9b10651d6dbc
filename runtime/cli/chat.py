"""``kvq chat``: a conversation in the terminal; answers to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvq.runtime.cli.commands import Toolbox, read_tools
from kvq.runtime.cli.loading import load_model
from kvq.runtime.cli.options import (
    CACHE,
    MODEL,
    SAMPLING,
    SETTINGS,
    SYSTEM,
    Command,
    generation_options,
    given,
    max_tokens,
    option,
    options,
    session_settings,
)
from kvq.runtime.cli.questions import argument_text
from kvq.runtime.cli.repl import Repl
from kvq.runtime.cli.sessions import SESSION, SessionFile
from kvq.runtime.errors import PromptError


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("question", required=False)
@options([SYSTEM, *SESSION])
@option("-q", "--quiet", is_flag=True, section="Basics", help="No notices, only answers and errors.")
@option("--no-history", is_flag=True, section="Basics", help="Do not keep what is typed for the next run.")
@option(
    "--tools",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    section="Basics",
    help="Commands the model may ask for; each is confirmed.",
)
@options(MODEL)
@options(CACHE)
@options([max_tokens(512), *SAMPLING[1:]])
@click.pass_context
def chat(
    ctx, question, system, session_file, session_readonly, quiet, no_history, tools, model, threads, **parameters
) -> None:
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
    settings = session_settings(parameters)
    generation = generation_options(parameters)
    kept = SessionFile.of(session_file, session_readonly)
    toolbox = None if tools is None else Toolbox(read_tools(tools))
    loaded = load_model(model, threads)
    repl = Repl(loaded, settings, system, generation, quiet, not no_history, toolbox)
    if kept is not None and kept.exists:
        repl.begin(kept.open(loaded, settings, given(ctx)))
    if kept is not None:
        repl.notice(kept.opened(repl.conversation.session, repl.conversation))
    try:
        with repl.leaving:
            repl.interactive(first) if sys.stdin.isatty() else repl.script(first)
    finally:
        if kept is not None and not isinstance(sys.exception(), KeyboardInterrupt):
            kept.close(repl.conversation.session)
            repl.notice(kept.closed(repl.conversation.session))
