"""``kvq inspect``: which words were worth their bits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from kvq.runtime.cli.loading import load_model
from kvq.runtime.cli.options import (
    CACHE,
    MODEL,
    OUTPUT,
    SESSION_SETTINGS,
    SETTINGS,
    Command,
    complete_policy,
    option,
    options,
    session_settings,
)
from kvq.runtime.cli.questions import read_prompt
from kvq.runtime.files import write_atomically

BASICS = [
    option("-f", "--file", "text_file", type=click.Path(path_type=Path), metavar="FILE", section="Basics",
           help="Read the text from a file, - is stdin."),
    option("--session", "session_file", type=click.Path(path_type=Path), metavar="FILE", section="Basics",
           help="Show a saved session: its text, its precisions."),
    option("--json", "as_json", is_flag=True, section="Basics", help="Print one JSON object with tokens and totals."),
    option("--html", "html_file", **OUTPUT, metavar="FILE", section="Basics",
           help="Write a self-contained HTML report instead."),
    option("--png", "png_file", **OUTPUT, metavar="FILE", section="Basics",
           help="Write a plot along the text instead."),
    option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", metavar="WHEN", section="Basics",
           show_default=True, help="24-bit colours: always, never, or auto, on a terminal without NO_COLOR."),
    option("-q", "--quiet", is_flag=True, section="Basics", help="No totals."),
]  # fmt: skip
POLICY = option("-p", "--policy", default="auto", metavar="NAME", show_default=True, section="Cache",
                shell_complete=complete_policy, help="Precisions; the names are those of kvq run.")  # fmt: skip


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("text", required=False)
@options([*BASICS, *MODEL, POLICY, *CACHE[1:]])
@click.pass_context
def inspect(
    ctx, text, text_file, session_file, model, threads, color, as_json, html_file, png_file, quiet, **parameters
) -> None:
    """Show TEXT with each token shaded by the precision it is cached at.

    The text is the argument, a file, stdin, or that of a saved session; a file given with an argument goes before it.
    Totals go to stderr.

    \b
    Examples:
      kvq inspect "The captain looked at the sea"
      kvq inspect -f chapter.txt --kv-bits 3.25 --html chapter.html
      kvq inspect -p rule -f chapter.txt --png chapter.png
      kvq inspect --session chapter.kvq
      cat chapter.txt | kvq inspect --json
    """
    import kvq  # onnxruntime and the rest load only now: --help stays quick
    from kvq.runtime.inspect.views import plot, report, terminal

    if png_file:
        import matplotlib  # noqa: F401 # a missing package is said before the model runs
    features = bool(as_json or html_file or png_file)
    if session_file:
        _refuse_beside_session(ctx)
        session = load_model(model, threads).load_session(session_file, backend=parameters["backend"])
        inspection = kvq.inspect_session(session, features=features)
    else:
        prompt = read_prompt(text, text_file)
        loaded = load_model(model, threads)
        inspection = kvq.inspect_text(loaded, prompt, features=features, **session_settings(parameters))
    if html_file:
        write_atomically(html_file, report.html(inspection))
    if png_file:
        write_atomically(png_file, plot.png(inspection))
    if as_json:
        click.echo(json.dumps(inspection.as_dict()))  # ASCII: no control character of the text gets out
    elif not html_file and not png_file:
        colored = terminal.wants_color(color, sys.stdout)
        width = shutil.get_terminal_size((0, 0)).columns
        click.echo(terminal.text(inspection, colored, width), nl=False, color=colored)
    if not quiet:
        if sys.stdout.isatty():
            click.echo(err=True)
        colored = terminal.wants_color(color, sys.stderr)
        click.echo(terminal.table(inspection, colored), nl=False, err=True, color=colored)


def _refuse_beside_session(ctx: click.Context) -> None:
    """A session has its text and its policy: options that would set them are refused, not ignored."""
    own = {"text", "text_file", *SESSION_SETTINGS} - {"backend"}
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
        if given and parameter.name in own:
            hint = parameter.get_error_hint(ctx)
            raise click.UsageError(f"{hint} and --session exclude each other: a session has its own", ctx)
