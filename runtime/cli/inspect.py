"""``kvq inspect``: which words were worth their bits."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import click

from kvq.runtime.cli.run import CACHE, nbytes, options, read_prompt


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("text", required=False)
@click.option(
    "-f", "--file", "text_file", type=click.Path(path_type=Path), help="Read the text from a file, - is stdin."
)
@click.option("-m", "--model", metavar="MODEL", help="Bundle folder or embedded model; the default model if not given.")
@options(CACHE)
@click.option("--threads", type=int, help="CPU threads; all available cores if not given.")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Shades in 24-bit colour; auto: on a terminal, unless NO_COLOR is set.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with tokens and totals.")
@click.option(
    "--html",
    "html_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a self-contained page instead of printing the text.",
)
@click.option(
    "--png",
    "png_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a plot of bits and features along the text instead of printing it.",
)
@click.option("-q", "--quiet", is_flag=True, help="No totals.")
def inspect(
    text, text_file, model, policy, kv_bits, kv_memory, recent, sink, backend, threads,
    color, as_json, html_file, png_file, quiet,
) -> None:  # fmt: skip
    """Show TEXT with each token shaded by the precision it is cached at.

    The text is the argument, a file, or stdin; a file given with an argument goes before it. The policy is adaptive
    if none is given. Totals go to stderr.

    \b
    Examples:
      kvq inspect "The captain looked at the sea"
      kvq inspect -f chapter.txt --kv-bits 3.25 --html chapter.html
      kvq inspect -p rule -f chapter.txt --png chapter.png
      cat chapter.txt | kvq inspect --json
    """
    import kvq  # onnxruntime and the rest load only now: --help stays quick
    from kvq.runtime.views import page, plot, terminal

    if png_file:
        import matplotlib  # noqa: F401 # a missing package is said before the model runs
    prompt = read_prompt(text, text_file)
    memory = None if kv_memory is None else nbytes(kv_memory)
    inspection = kvq.inspect_text(
        kvq.load(model, threads=threads), prompt, policy or "adaptive", features=bool(as_json or html_file or png_file),
        recent=recent, sink=sink, backend=backend, kv_bits=kv_bits, kv_memory=memory,
    )  # fmt: skip
    if html_file:
        write(html_file, page.html(inspection).encode())
    if png_file:
        write(png_file, plot.png(inspection))
    if as_json:
        click.echo(json.dumps({"text": prompt, **inspection.as_dict()}))  # ASCII: no control character of the text
    elif not html_file and not png_file:
        colored = terminal.wants_color(color, sys.stdout)
        width = shutil.get_terminal_size((0, 0)).columns
        click.echo(terminal.text(inspection, colored, width), nl=False, color=colored)
    if not quiet:
        if sys.stdout.isatty():
            click.echo(err=True)
        colored = terminal.wants_color(color, sys.stderr)
        click.echo(terminal.table(inspection, colored), nl=False, err=True, color=colored)


def write(file: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from None
