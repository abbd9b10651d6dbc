"""What a model computes, as data.

A layer is a list of steps. Each takes the value that the one before it yields, float32 [tokens, features];
the first takes the residual stream. Graphs are built from the steps, in `kvq.exporter.graphs.layers`, and
whatever else runs a model reads the graphs: so a layer is described in the file of its family and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvq.exporter.sources.base import Blocks, Source
from kvq.runtime.bundle.manifest import Architecture

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Norm:
    """RMS norm of the value.

    Attributes:
        gain: name of the parameter, [features].
        features: of the value.
        epsilon: added to the mean square.
    """

    gain: str
    features: int
    epsilon: float

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter."""
        return {self.gain: (self.features,)}


@dataclass(frozen=True)
class Project:
    """A product with matrices that take the same value, and what they yield side by side.

    Attributes:
        parts: names of the matrices, without ".weight" or ".bias".
        rows: of each: features that it yields.
        columns: of all of them: features that they take.
        bias: whether each has a bias.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bias: bool = False

    @property
    def name(self) -> str:
        """What the matrices are called together, such as ``model.layers.0.mlp.gate_proj+up_proj``."""
        return "+".join([self.parts[0], *(part.rpartition(".")[2] for part in self.parts[1:])])

    @property
    def weights(self) -> list[str]:
        """Names of the matrices' parameters, in order."""
        return [f"{part}.weight" for part in self.parts]

    @property
    def biases(self) -> list[str]:
        """Names of the biases' parameters, in order; empty without."""
        return [f"{part}.bias" for part in self.parts] if self.bias else []

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter."""
        found: Shapes = {name: (n, self.columns) for name, n in zip(self.weights, self.rows, strict=True)}
        return found | dict(zip(self.biases, ((n,) for n in self.rows), strict=False))


@dataclass(frozen=True)
class Attend:
    """Projections to queries, keys and values, the rotary embedding of the first two, attention, and its output.

    Between the two projections stands the runtime's own work, so graphs are cut here.

    Attributes:
        inputs: yields heads of head_dim features: all queries, then all keys, then all values.
        output: takes what attention makes of the values, a head for every query head.
        norms: of queries and of keys, before the rotary embedding: of each head where a norm has head_dim features, of
            all heads together where it has those of all.
        rotary: which of the model's rotary embeddings; None rotates nothing.
        window: tokens that a token sees, itself included; 0: all.
    """

    inputs: Project
    output: Project
    norms: tuple[Norm, Norm] | None = None
    rotary: int | None = 0
    window: int = 0

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter."""
        found = self.inputs.parameters() | self.output.parameters()
        for step in self.norms or ():
            found |= step.parameters()
        return found


@dataclass(frozen=True)
class SwiGLU:
    """silu of the first half of the value's features times the second half."""

    def parameters(self) -> Shapes:
        """None."""
        return {}


@dataclass(frozen=True)
class GeGLU:
    """gelu of the first half of the value's features, in its tanh form, times the second half."""

    def parameters(self) -> Shapes:
        """None."""
        return {}


@dataclass(frozen=True)
class Add:
    """Adds the value to the residual stream; the sum is the next step's value."""

    def parameters(self) -> Shapes:
        """None."""
        return {}


Step = Norm | Project | SwiGLU | GeGLU | Add


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        before: steps up to attention; they leave the residual stream as it is.
        attend: attention.
        after: steps from there to the end, which is an `Add`.
    """

    before: tuple[Step, ...]
    attend: Attend
    after: tuple[Step, ...]

    @classmethod
    def of(cls, *steps: Step | Attend) -> Layer:
        """Cut a list of steps at attention.

        Raises:
            ValueError: steps that no layer has.
        """
        before: list[Step] = []
        after: list[Step] = []
        attends: list[Attend] = []
        for step in steps:
            if isinstance(step, Attend):
                attends.append(step)
            else:
                (after if attends else before).append(step)
        if len(attends) != 1 or Add() in before or after[-1:] != [Add()]:
            raise ValueError("a layer has one Attend, no Add before it, and an Add at its end")
        return cls(tuple(before), attends[0], tuple(after))

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter."""
        found: Shapes = {}
        for step in (*self.before, self.attend, *self.after):
            found |= step.parameters()
        return found


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding (Su et al., arXiv 2104.09864), which pairs channel i of a head with channel head_dim // 2 + i.

    Attributes:
        inv_freq: frequencies, float32 [head_dim // 2]; 0 leaves a pair as it is.
        scale: factor on cosine and sine, float32 [head_dim // 2] (yarn's attention scaling, else 1).
    """

    inv_freq: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Adapted:
    """What becomes of a parameter before anything else is done with it: (parameter + offset) * factor.

    Attributes:
        factor: a multiplier of the model that weights can hold.
        offset: added before; of norms only.
        order: where rows come from, int [rows]; None leaves them where they are.
    """

    factor: float = 1.0
    offset: float = 0.0
    order: np.ndarray | None = None

    def of(self, values: np.ndarray) -> np.ndarray:
        """The parameter that is meant, float32, of the one that is held."""
        values = (values + np.float32(self.offset)) * np.float32(self.factor)
        return values if self.order is None else values[self.order]

    def of_blocks(self, blocks: Blocks) -> Blocks:
        """The same of a matrix in blocks."""
        if self.offset:
            raise ValueError("blocks have no offset")
        blocks = blocks.times(self.factor)
        return blocks if self.order is None else blocks.rows(self.order)


@dataclass(frozen=True)
class Model:
    """A model, but for its weights.

    Attributes:
        shape: of the model.
        embedding: name of the table [vocab, hidden] whose rows are the first layer's residual stream.
        layers: shape.layers of them.
        norm: of the last layer's residual stream.
        head: name of the matrix [vocab, hidden] that takes it; the embedding's where they are tied.
        rotaries: rotary embeddings that layers name.
        adapted: what becomes of parameters, by name; of those that are not here, nothing.
        embedding_scale: factor on rows of the embedding.
        notes: what a person should know of it, one line each.
    """

    shape: Architecture
    embedding: str
    layers: tuple[Layer, ...]
    norm: Norm
    head: str
    rotaries: tuple[Rotary, ...]
    adapted: Mapping[str, Adapted] = field(default_factory=dict)
    embedding_scale: float = 1.0
    notes: tuple[str, ...] = ()

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter there must be."""
        table = (self.shape.vocab, self.shape.hidden)
        found = {self.embedding: table, self.head: table} | self.norm.parameters()
        for layer in self.layers:
            found |= layer.parameters()
        return found


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's converter writes a family into GGUF files.

    Attributes:
        architecture: value of general.architecture, and the first part of the family's keys.
        layer: of the tensors of a layer, the name in the file -> Hugging Face's.
        whole: the same of the other tensors.
        interleaved: last part of Hugging Face's name -> field of config.json with its number of heads, for matrices
            in whose heads the halves that the rotary embedding pairs stand row beside row.
        config: fields of config.json that a file does not hold.
        numbers: of keys that the family has besides, what comes behind the architecture's name -> field of config.json.
        rotates_parts: whether its rotary embedding may leave channels of a head as they are.
    """

    architecture: str
    layer: Mapping[str, str]
    whole: Mapping[str, str]
    interleaved: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    rotates_parts: bool = False


@dataclass(frozen=True)
class Family:
    """What a file of this package offers under a model_type of config.json.

    Attributes:
        describe: a source -> the description of its model. Raises CheckpointError for a configuration that is not
            valid and UnsupportedArchitectureError for a variant that kvq does not implement.
        gguf: how GGUF files hold it; None if they are not read.
    """

    describe: Callable[[Source], Model]
    gguf: Gguf | None = None
