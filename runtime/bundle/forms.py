"""What each graph of a bundle takes and yields, as the runtime feeds and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.bundle.onnx_file import FLOAT32, INT64
from kvq.runtime.bundle.shapes import TOKENS, Shape, elements

# Names with types and shapes, see `kvq.runtime.bundle.shapes`.
Values = Mapping[str, tuple[int, Shape]]
IDS: Values = {"ids": (INT64, (TOKENS,)), "positions": (INT64, (TOKENS,))}
# What the first segment calls cosine and sine of each rotary embedding that a model's layers may have.
ANGLES = (("cosine", "sine"), ("local_cosine", "local_sine"))


class Form(NamedTuple):
    """A kind of graph.

    Attributes:
        inputs, outputs: of the graph, all of them.
        optional, optional_outputs: inputs and outputs that it may have besides.
        layers: for how many its operators stand.
        attends: it holds attention, of each of these layers once.
        vocab: rows of a table that it looks ids up in.
        widest: features of the widest of its values, about.
        heads: how many of queries, how many of keys, and the features of each.
    """

    inputs: Values
    outputs: Values
    vocab: int
    widest: int
    layers: int = 1
    attends: bool = False
    optional: Values = MappingProxyType({})
    optional_outputs: Values = MappingProxyType({})
    heads: tuple[int, int, int] = (0, 0, 0)


def _form(inputs: Values, outputs: Values, shape: Architecture, **more: object) -> Form:
    """A form whose widest value is what goes in or out, or between the products of a layer."""
    sizes = [abs(elements(dims)) for values in (inputs, outputs) for _, dims in values.values()]
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    inner = [] if "logits" in {*inputs, *outputs} else [2 * shape.ffn, (shape.heads + 2 * shape.kv_heads) * heads[2]]
    widest = max(limits.LEAST_WIDTH, *sizes, *inner)
    return Form(inputs, outputs, shape.vocab, widest, heads=heads, **more)  # type: ignore[arg-type]


def segment(shape: Architecture, index: int) -> Form:
    """Of segment `index`, of layers + 1; see `kvq.runtime.compute.passes.SegmentedPass`."""
    half = shape.head_dim // 2
    angles: Values = {name: (FLOAT32, (TOKENS, half)) for pair in ANGLES for name in pair}
    inputs: dict[str, tuple[int, Shape]] = dict(IDS)
    outputs: dict[str, tuple[int, Shape]] = {"residual_out": (FLOAT32, (TOKENS, shape.hidden))}
    if index > 0:
        inputs = {
            "residual": (FLOAT32, (TOKENS, shape.hidden)),
            "attention": (FLOAT32, (TOKENS, shape.heads * shape.head_dim)),
        }
    if index < shape.layers:
        outputs["query_key"] = (FLOAT32, (TOKENS, shape.heads + shape.kv_heads, shape.head_dim))
        outputs["value"] = (FLOAT32, (TOKENS, shape.kv_heads, shape.head_dim))
    # A layer may have no rotary embedding, and a model none at all.
    taken, given = (angles if 0 < index < shape.layers else {}), (angles if index == 0 else {})
    return _form(inputs, outputs, shape, optional=taken, optional_outputs=given)


def decoder(shape: Architecture) -> Form:
    """Of all layers in one graph."""
    return _form(IDS, {"residual_out": (FLOAT32, (TOKENS, shape.hidden))}, shape, layers=shape.layers, attends=True)


def head(shape: Architecture) -> Form:
    """Of what makes logits."""
    residual: Values = {"residual": (FLOAT32, (TOKENS, shape.hidden))}
    return _form(residual, {"logits": (FLOAT32, (TOKENS, shape.vocab))}, shape)


def uncertainty(shape: Architecture) -> Form:
    """Of what a policy may ask of logits."""
    outputs: Values = {name: (FLOAT32, (TOKENS,)) for name in ("entropy", "confidence")}
    return _form({"logits": (FLOAT32, (TOKENS, shape.vocab))}, outputs, shape)


def controller(shape: Architecture, classes: int) -> Form:
    """Of a learned policy of so many classes, which reads some of what there is to know of a token."""
    side = (shape.layers, shape.kv_heads, TOKENS, shape.head_dim)
    named = ("entropy", "rarity", "attention_variance", "confidence")
    optional: dict[str, tuple[int, Shape]] = {name: (FLOAT32, (TOKENS,)) for name in named}
    optional |= {
        **IDS,
        "residual": (FLOAT32, (TOKENS, shape.hidden)),
        "keys": (FLOAT32, side),
        "values": (FLOAT32, side),
    }
    form = _form({}, {"scores": (FLOAT32, (TOKENS, classes))}, shape, optional=optional)
    return form._replace(widest=max(form.widest, shape.hidden, 2 * abs(elements(side))))
