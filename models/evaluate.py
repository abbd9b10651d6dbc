"""How good a bundle's language model is: bits per byte, loss by position, copying over a distance.

    python -m kvq.models.evaluate valid.txt.xz --model BUNDLE

Everything runs through the kvq runtime, so quantized weights are measured as they will run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from kvq.composition import load
from kvq.models.corpus import END_OF_TEXT, documents
from kvq.runtime.session.model import Model

# Names that occur in no book of the corpus: what is copied must come from the context.
NAMES = ("Zorvath Quillimane", "Ibbeth Tarranook", "Maxel Druvenshaw", "Oskavia Prendlewick", "Jorun Vashteel",
         "Pellamy Greckhorn", "Wisterna Bolquade", "Tamrick Ullenfaye")  # fmt: skip
SENTENCE = '"My name is {name}," said the stranger, and he sat down by the fire.'


def token_loss(model: Model, ids: np.ndarray) -> np.ndarray:
    """Loss in nats of ids[1:] given what stands before each, float32 [len(ids) - 1].

    The window covers everything, so the cache is as exact as it can be.
    """
    session = model.session("fp16", recent=len(ids), prefill_chunk=256)
    logits = session.append(ids, all_logits=True)[:-1]
    peak = logits.max(axis=1)
    total = np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak
    return total - logits[np.arange(len(logits)), ids[1:]]


def text_ids(model: Model, text: Path, most_tokens: int | None) -> tuple[np.ndarray, int]:
    """Ids of the documents of a text, each closed by end-of-text, and their UTF-8 bytes."""
    end = model.tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    nbytes = 0
    for document in documents(text):
        ids += [*model.tokenizer.encode(document).ids, end]
        nbytes += len(document.encode())
        if most_tokens is not None and len(ids) >= most_tokens:
            break
    return np.asarray(ids, np.int64), nbytes


def strided_windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of windows in which every token but the first is scored exactly once.

    Each scored token sees at least `context - stride` tokens before it, except in the first window.
    """
    scored = 1
    while scored < count:
        start = max(0, scored + stride - context)
        stop = min(start + context, count)
        yield start, stop, scored
        scored = stop


def bits_per_byte(model: Model, ids: np.ndarray, nbytes: int, context: int = 1024, stride: int = 512) -> float:
    """Strided loss of a text in bits per UTF-8 byte; end-of-text tokens cost bits but count no bytes."""
    total = 0.0
    windows = list(strided_windows(len(ids), context, stride))
    with click.progressbar(windows, label="bits per byte", file=sys.stderr) as bar:
        for start, stop, first in bar:
            total += float(token_loss(model, ids[start:stop])[first - start - 1 :].sum())
    return total / math.log(2) / nbytes


def loss_by_position(model: Model, ids: np.ndarray, length: int, windows: int) -> dict[str, float]:
    """Mean loss in nats by range of positions, over evenly spaced windows of that length."""
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    with click.progressbar(starts, label="loss by position", file=sys.stderr) as bar:
        losses = np.mean([token_loss(model, ids[s : s + length]) for s in bar], axis=0)
    edges = [e for e in (0, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048) if e < length]
    return {
        f"{a}-{b - 1}": round(float(losses[a:b].mean()), 4)
        for a, b in zip(edges, [*edges[1:], length], strict=True)
        if b > a and a < len(losses)
    }


def loss_by_context(model: Model, ids: np.ndarray, spans: int, length: int = 64) -> list[dict[str, float]]:
    """Loss of the same tokens when they stand further and further back in their window.

    `spans` runs of `length` tokens, evenly spaced over the text, each read with 64, 128, 256, 512
    and about 1,000 tokens before it. Unlike the loss by position, the rows differ in nothing but
    the context, so small gains show: "gain" is the mean drop against the row before, in nats, with
    its standard error over the spans.
    """
    contexts = [64, 128, 256, 512, 1024 - length]
    starts = np.linspace(contexts[-1], len(ids) - length, spans).astype(int)
    losses = np.empty((len(contexts), spans))
    with click.progressbar(range(spans), label="loss by context", file=sys.stderr) as bar:
        for i in bar:
            for row, context in enumerate(contexts):
                window = ids[starts[i] - context : starts[i] + length]
                losses[row, i] = token_loss(model, window)[-length:].mean()
    rows = []
    for row, context in enumerate(contexts):
        rows.append({"context": context, "loss": round(float(losses[row].mean()), 4)})
        if row:
            gain = losses[row - 1] - losses[row]
            rows[-1] |= {"gain": round(float(gain.mean()), 4), "error": round(float(gain.std() / spans**0.5), 4)}
    return rows


def copying(model: Model, ids: np.ndarray, distance: int) -> dict[str, float]:
    """Loss in nats per token of an unknown surname, when the full name stood `distance` tokens back.

    The text is: a sentence with the full name, running text, the same sentence again up to the
    surname. "absent" has another name in the first sentence, all else equal; the difference is
    what copying over that distance gains.
    """
    encode = model.tokenizer.encode
    gains = {"present": 0.0, "absent": 0.0}
    for i, name in enumerate(NAMES):
        first, last = name.split()
        filler = ids[1000 + i * 5000 :][:distance].tolist()
        again = encode("\n\n" + SENTENCE.split("{name}")[0].format() + first).ids
        surname = encode(" " + last).ids
        for kind, told in (("present", name), ("absent", NAMES[(i + 3) % len(NAMES)])):
            opening = encode(SENTENCE.format(name=told) + "\n\n").ids
            fill = filler[: max(0, distance - len(opening) - len(again))]
            text = np.asarray([*opening, *fill, *again, *surname], np.int64)
            gains[kind] += float(token_loss(model, text)[-len(surname) :].mean()) / len(NAMES)
    return {"distance": distance, **{k: round(v, 3) for k, v in gains.items()}}


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", "reference", help="bundle; the embedded model if not given")
@click.option("--context", default=1024, show_default=True)
@click.option("--stride", default=512, show_default=True)
@click.option("--tokens", type=int, help="use about this many tokens of the text; all if not given")
@click.option("--windows", default=64, show_default=True, help="windows for the loss by position; 0 leaves it out")
@click.option("--spans", default=400, show_default=True, help="spans for the loss by context; 0 leaves it out")
def main(text, reference, context, stride, tokens, windows, spans) -> None:
    """Measure the language model of a bundle on TEXT; prints one JSON object."""
    model = load(reference)
    ids, nbytes = text_ids(model, text, tokens)
    length = min(model.architecture.context, 2048)
    result = {
        "model": model.bundle.manifest.name,
        "weights": model.bundle.manifest.weights,
        "tokens": len(ids),
        "bytes": nbytes,
        "bits_per_byte": round(bits_per_byte(model, ids, nbytes, context, stride), 4),
    }
    if windows:
        result["loss_by_position"] = loss_by_position(model, ids, length, windows)
    if spans:
        result["loss_by_context"] = loss_by_context(model, ids, spans)
        result["copying"] = [copying(model, ids, d) for d in (100, 300, 1000) if d + 64 < length]
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
