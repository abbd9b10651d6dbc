"""``kvq export``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from kvq.runtime.cli.options import OFFLINE, in_a_folder
from kvq.runtime.errors import PromptError, one_line
from kvq.runtime.files import read_bounded


class Weights(click.ParamType):
    """A way to hold weights by name, or bits a weight."""

    name = "weights"
    NAMES = ("auto", "source", "fp32", "int8", "int6", "int5", "int4")

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """For the help page."""
        return f"[{'|'.join(self.NAMES)}|BITS]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """A name, or a number of bits from 4 to 8."""
        if value in self.NAMES:
            return str(value)
        try:
            bits = float(str(value))
        except ValueError:
            bits = 0.0
        if not 4 <= bits <= 8:
            self.fail(f"{value!r} is none of {', '.join(self.NAMES)}, and no number from 4 to 8", param, ctx)
        return bits


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path), callback=in_a_folder)
@click.option(
    "-w",
    "--weights",
    type=Weights(),
    default="auto",
    show_default=True,
    help="Of the layers' weights: auto leaves blocks of the source that are multiplied as they are and takes 8 bits"
    " for the rest; source leaves those with a minimum too (Q4_1, Q4_K), which takes less memory, and longer for a"
    " prompt; int6 and int5 take a byte a weight on disk and 6 and 5 bits in memory; a number from 4 to 8 is bits a"
    " weight on average: 4, 5, 6 or 8 for every matrix, where that is measured to do least damage. Embedding and head"
    " take 8 bits when not fp32.",
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "int16-head", "fp32"]),
    default="int8",
    show_default=True,
    help="In products with quantized weights: int8 is fast, fp32 exact, int16-head takes two bytes at the head only.",
)
@click.option(
    "--block",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option(
    "--rotate/--no-rotate",
    default=True,
    show_default=True,
    help="Rotate heads, and what products take, by Hadamard matrices.",
)
@click.option("--center/--no-center", default=True, show_default=True, help="Subtract each head's mean key.")
@click.option(
    "--keys",
    type=click.Choice(["balanced", "plain"]),
    help="balanced: in a basis measured on the calibration text, in which low precisions of keys cost half as much;"
    " the default where keys are centred.",
)
@click.option(
    "--compensate/--no-compensate",
    default=None,
    help="Let weights that are quantized here make up for their own errors on the calibration text, which takes as long"
    " again; the default below 8 bits.",
)
@click.option(
    "--profiles/--no-profiles",
    default=None,
    help="Measure on the calibration text what each layer's keys and values do to the predictions, and give every layer"
    " the precisions that suit it, at no more bytes; where keys are centred. It takes several times as long as the"
    " rest. The default is what comes with the package for this model, if anything.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to measure keys and inputs on; a built-in one if not given.",
)
@click.option(
    "--layout",
    type=click.Choice(["segments", "single"]),
    default="segments",
    show_default=True,
    help="segments is a bundle for kvq; single is the standard one-file ONNX in fp32.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of the longest text; the model's own if not given. A model with rotary factors for short and for long"
    " texts takes those for short ones unless it is asked for more here.",
)
@click.option("--name", help="Name in the bundle; that of the checkpoint if not given.")
@OFFLINE
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.pass_context
def export(
    ctx,
    checkpoint,
    out,
    weights,
    activations,
    block,
    rotate,
    center,
    keys,
    compensate,
    profiles,
    calibration,
    layout,
    context,
    name,
    overwrite,
) -> None:
    """Convert CHECKPOINT to a bundle in the folder OUT.

    CHECKPOINT is a .gguf file, a Hugging Face folder or a hub id of a model of a family that kvq knows.

    \b
    Examples:
      kvq export SmolLM2-360M-Instruct.Q8_0.gguf smollm2-360m
      kvq export ./my-checkpoint my-bundle --weights int4
      kvq export HuggingFaceTB/SmolLM-135M smollm-135m
    """  # fmt: skip
    if layout == "single":
        _single(ctx, checkpoint, out)
        return
    text = None if calibration is None else _text_of(calibration, center)
    if keys == "balanced" and not center:
        raise click.UsageError("--keys balanced centres keys too; leave --no-center out")
    from kvq.exporter.export import export as run_export

    with _bar() as progress:
        summary = run_export(
            checkpoint,
            out,
            weights=weights,
            activations=activations,
            block=int(block),
            rotate=rotate,
            center=center,
            keys=keys,
            compensate=compensate,
            profiles=profiles,
            calibration=text,
            context=context,
            name=name,
            overwrite=overwrite,
            progress=progress,
        )
    click.echo("\n".join(map(one_line, summary.lines())))


MOST_TEXT = 1 << 28  # bytes of a calibration text, whose first tokens are what is read


def _text_of(calibration: Path, center: bool) -> str:
    """The calibration text."""
    try:
        text = read_bounded(calibration, MOST_TEXT).decode()
    except OSError as error:
        raise PromptError(f"cannot read {calibration}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise PromptError(f"{calibration} is not UTF-8; convert it, e.g. with iconv -t UTF-8") from None
    if not center:
        raise click.UsageError("--calibration has no use with --no-center; leave one of them out")
    return text


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, from the first progress on: a refused checkpoint is one line."""
    with ExitStack() as stack:
        bar = None

        def progress(done: int, total: int, what: str) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(click.progressbar(length=100, label=what, file=sys.stderr))
            bar.label = what
            bar.update(100 * done // total - bar.pos)

        yield progress


def _single(ctx: click.Context, checkpoint: str, out: Path) -> None:
    """The one-file layout; options that only bundles have are refused rather than ignored."""
    bundle_only = (
        "weights",
        "activations",
        "block",
        "rotate",
        "center",
        "keys",
        "compensate",
        "profiles",
        "calibration",
        "context",
        "name",
        "overwrite",
    )
    given = [n for n in bundle_only if ctx.get_parameter_source(n) != click.core.ParameterSource.DEFAULT]
    if given:
        raise click.UsageError(f"--layout single takes no --{given[0]}")
    from kvq.exporter.single import export_single

    click.echo(one_line(f"exporting {checkpoint} through optimum; a large model takes minutes"), err=True)
    begun = time.perf_counter()
    folder = export_single(checkpoint, out)
    size = sum(f.stat().st_size for f in folder.iterdir())
    click.echo(one_line(f"{folder}: {size / 1e6:.1f} MB in {time.perf_counter() - begun:.1f} s"))
