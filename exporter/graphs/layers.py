"""Steps of a description -> nodes of a graph, in two forms.

In a segment, attention is left to the caller: segment i takes the residual stream and the attention output of
layer i - 1 and yields the residual stream and layer i's queries, keys and values. In the decoder, attention and
what stands between the products are operators of the native library: four nodes a layer that are seventeen in
the segments. All tensors are [tokens, features]; "tokens" is the only free dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from kvq.exporter.architectures.description import Add, Attend, GeGLU, Norm, Project, Rotary, Step, SwiGLU
from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.graphs.builder import CONTRIB, KVQ, Graph
from kvq.exporter.graphs.options import GraphOptions
from kvq.exporter.graphs.products import Products
from kvq.exporter.key_basis import KeyBasis
from kvq.exporter.rotation import rotate_inputs, rotate_outputs
from kvq.exporter.weights.matrices import Change
from kvq.runtime.bundle.forms import ANGLES

NO_TURN = -1  # among the angles of rotary embeddings, by their numbers


def gain(graph: Graph, checkpoint: Checkpoint, step: Norm) -> str:
    """A norm's gain as a constant of a graph."""
    return graph.weight(step.gain, checkpoint.tensor(step.gain))


def norm(graph: Graph, checkpoint: Checkpoint, step: Norm, x: str) -> str:
    """RMS norm of x."""
    weights = gain(graph, checkpoint, step)
    return graph.op("SimplifiedLayerNormalization", x, weights, axis=-1, epsilon=step.epsilon, stash_type=1)


class Layers(ABC):
    """Builds the layers of a graph, step by step.

    Args:
        graph: to build.
        checkpoint: whose layers.
        products: with its matrices.
        options: how.

    Attributes:
        residual: name of the residual stream [tokens, hidden] as it is after the steps so far.
        value: name of what the last step yields.
        angles: cosine and sine [tokens, head_dim // 2] of each rotary embedding that there is at hand.
    """

    def __init__(self, graph: Graph, checkpoint: Checkpoint, products: Products, options: GraphOptions) -> None:
        self.graph, self.checkpoint, self.products, self.options = graph, checkpoint, products, options
        self.shape = checkpoint.architecture
        self.residual = self.value = ""
        self.angles: dict[int, tuple[str, str]] = {}

    def embed(self) -> None:
        """Token ids and positions -> residual stream and the angles of all rotary embeddings."""
        graph, model = self.graph, self.checkpoint.model
        ids = graph.input("ids", "tokens", dtype=TensorProto.INT64)
        positions = graph.input("positions", "tokens", dtype=TensorProto.INT64)
        rows = self.products.embedding(graph, ids)
        if model.embedding_scale != 1.0:
            rows = graph.op("Mul", rows, graph.constant(model.embedding_scale, np.float32))
        self.residual = self.value = rows
        self._column = graph.op("Reshape", graph.op("Cast", positions, to=TensorProto.FLOAT), graph.constant([-1, 1]))
        self.angles = {number: self._angles(rotary) for number, rotary in enumerate(model.rotaries)}

    def _angles(self, rotary: Rotary) -> tuple[str, str]:
        """Cosine and sine of a rotary embedding's angles at the positions."""
        graph, scale = self.graph, rotary.scale
        angles = graph.op("Mul", self._column, graph.constant(rotary.inv_freq[None], np.float32))
        cosine, sine = graph.op("Cos", angles), graph.op("Sin", angles)
        if (scale != 1).any():
            factor = graph.constant(scale[0] if (scale == scale[0]).all() else scale[None], np.float32)
            cosine, sine = graph.op("Mul", cosine, factor), graph.op("Mul", sine, factor)
        return cosine, sine

    def run(self, steps: Sequence[Step]) -> None:
        """Put steps into the graph, in order."""
        for step in steps:
            match step:
                case Norm():
                    self.value = norm(self.graph, self.checkpoint, step, self.value)
                case Project():
                    self.value = self.project(step)
                case SwiGLU():
                    self.value = self.swiglu()
                case GeGLU():
                    self.value = self.geglu()
                case Add():
                    self.residual = self.value = self.graph.op("Add", self.residual, self.value)

    @abstractmethod
    def swiglu(self) -> str:
        """silu of the value's first half times its second."""

    def geglu(self) -> str:
        """gelu of the value's first half times its second."""
        gate, up = self.graph.split(self.value, [self.shape.ffn, self.shape.ffn])
        return self.graph.op("Mul", self.graph.op("FastGelu", gate, domain=CONTRIB), up)  # that is the tanh form

    def weights_of_basis(self, basis: KeyBasis, layer: int) -> list[str]:
        """A layer's scale [kv_heads, head_dim], axes [kv_heads, rank, head_dim] and stretch [kv_heads, rank]."""
        parts = {"scale": basis.scale, "axes": basis.axes, "stretch": basis.stretch}
        return [self.graph.weight(f"model.layers.{layer}.key_{name}", part[layer]) for name, part in parts.items()]

    def project(self, step: Project, change: Change | None = None) -> str:
        """Projections of the value, rotated before if its matrix is."""
        block = self.products.turn(step, change)
        value = self.turned(self.value, block) if block else self.value
        return self.products.project(self.graph, value, step, change)

    def turned(self, x: str, block: int) -> str:
        """Every block of x rotated."""
        return self.products.turned(self.graph, x, block)

    def project_inputs(self, step: Attend) -> str:
        """Projections of the value: [tokens, (heads + 2 kv_heads) * head_dim]."""
        qkv = self.project(step.inputs, self._rotate_values if self.options.folds_values else None)
        return qkv if step.norms is None else self._normed(qkv, *step.norms)

    def _normed(self, qkv: str, of_queries: Norm, of_keys: Norm) -> str:
        """The same with norms of queries and keys."""
        graph, shape, parts = self.graph, self.shape, []
        sizes = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        query, key, value = graph.split(qkv, sizes)
        for x, step, size in ((query, of_queries, sizes[0]), (key, of_keys, sizes[1])):
            if step.features == size:
                parts.append(norm(graph, self.checkpoint, step, x))
                continue
            heads = graph.op("Reshape", x, graph.constant([-1, size // step.features, step.features]))
            parts.append(graph.op("Reshape", norm(graph, self.checkpoint, step, heads), graph.constant([-1, size])))
        return graph.op("Concat", *parts, value, axis=-1)

    def project_output(self, step: Attend, attention: str) -> str:
        """Projection of attention's output [tokens, heads * head_dim], whose heads are rotated as the values are."""
        change = self._unrotate if self.options.folds_outputs else None
        return self.products.project(self.graph, attention, step.output, change)

    def _rotate_values(self, stacked: np.ndarray) -> np.ndarray:
        """Rotate the value rows at the end of a stacked weight or bias."""
        start = (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim
        return np.concatenate([stacked[:start], rotate_outputs(stacked[start:], self.options.rotation)])

    def _unrotate(self, x: np.ndarray) -> np.ndarray:
        return rotate_inputs(x, self.options.rotation) if x.ndim == 2 else x  # a bias is added after


class Segment(Layers):
    """The steps from one layer's attention to the next one's."""

    def begin(self, before: Attend) -> None:
        """Take the residual stream and what attention made of the layer before."""
        self.residual = self.graph.input("residual", "tokens", self.shape.hidden)
        attention = self.graph.input("attention", "tokens", self.shape.heads * self.shape.head_dim)
        if self.options.turns_back:
            attention = self._rotated(attention, self.shape.heads)
        self.value = self.project_output(before, attention)

    def take_angles(self, rotary: int) -> None:
        """Take the angles of a rotary embedding, which the first segment yields."""
        cosine, sine = (self.graph.input(name, "tokens", self.shape.head_dim // 2) for name in ANGLES[rotary])
        self.angles[rotary] = cosine, sine

    def give_angles(self) -> None:
        """Yield the angles of all rotary embeddings."""
        for rotary, pair in self.angles.items():
            for value, name in zip(pair, ANGLES[rotary], strict=True):
                self.graph.output(value, name, "tokens", self.shape.head_dim // 2)

    def attend(self, step: Attend, layer: int) -> None:
        """Projections, rotary embedding, basis, rotation, centring -> the outputs query_key and value."""
        graph, shape = self.graph, self.shape
        both, mean_keys = shape.heads + shape.kv_heads, self.options.mean_keys[layer]
        sizes = [both * shape.head_dim, shape.kv_heads * shape.head_dim]
        query_key, value = graph.split(self.project_inputs(step), sizes)
        if step.rotary is not None:
            query_key = graph.op(
                "RotaryEmbedding",
                graph.op("Reshape", query_key, graph.constant([1, -1, both * shape.head_dim])),
                graph.constant([0]),  # row i of cosine and sine belongs to token i
                *self.angles[step.rotary],
                domain=CONTRIB,
            )
        query_key = graph.op("Reshape", query_key, graph.constant([-1, both, shape.head_dim]))
        if self.options.key_basis is not None:
            query_key = self._in_basis(query_key, self.options.key_basis, layer)
        if self.options.rotates:
            query_key = graph.op("MatMul", query_key, graph.weight("rotation", self.options.rotation))
        if mean_keys.any():
            mean = np.zeros((both, shape.head_dim), np.float32)
            mean[shape.heads :] = mean_keys
            query_key = graph.op("Sub", query_key, graph.weight(f"model.layers.{layer}.mean_keys", mean))
        graph.output(query_key, "query_key", "tokens", both, shape.head_dim)
        if self.options.rotates_values:
            value = self._rotated(value, shape.kv_heads)
        value = graph.op("Reshape", value, graph.constant([-1, shape.kv_heads, shape.head_dim]))
        graph.output(value, "value", "tokens", shape.kv_heads, shape.head_dim)

    def swiglu(self) -> str:
        gate, up = self.graph.split(self.value, [self.shape.ffn, self.shape.ffn])
        # QuickGelu with alpha 1 is SiLU.
        return self.graph.op("Mul", self.graph.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)

    def _in_basis(self, query_key: str, basis: KeyBasis, layer: int) -> str:
        """Queries and keys [tokens, heads + kv_heads, head_dim] in the basis, see `KeyBasis`."""
        graph, shape = self.graph, self.shape
        kv_heads, head_dim, one = shape.kv_heads, shape.head_dim, graph.constant([1], np.float32)
        scale, axes, stretch = self.weights_of_basis(basis, layer)
        scale, stretch = (graph.op("Reshape", x, graph.constant([kv_heads, 1, -1])) for x in (scale, stretch))
        across = graph.op("Transpose", axes, perm=[0, 2, 1])
        by_head = graph.op("Transpose", query_key, perm=[1, 0, 2])
        parts = graph.ops("Split", 2, by_head, graph.constant([shape.heads, kv_heads]), axis=0)
        turned = []
        sides = ((shape.heads, "Div", graph.op("Div", one, stretch)), (kv_heads, "Mul", stretch))
        for part, (heads, times, factor) in zip(parts, sides, strict=True):
            rows = graph.op("Reshape", part, graph.constant([kv_heads, -1, head_dim]))
            scaled = graph.op(times, rows, scale)
            more = graph.op("Mul", graph.op("MatMul", scaled, across), graph.op("Sub", factor, one))
            grown = graph.op("Add", scaled, graph.op("MatMul", more, axes))
            turned.append(graph.op("Reshape", grown, graph.constant([heads, -1, head_dim])))
        return graph.op("Transpose", graph.op("Concat", *turned, axis=0), perm=[1, 0, 2])

    def _rotated(self, x: str, heads: int) -> str:
        """Every head of x [tokens, heads * head_dim] rotated; the rotation is its own inverse."""
        graph, head_dim = self.graph, self.shape.head_dim
        split = graph.op("Reshape", x, graph.constant([-1, heads, head_dim]))
        rotated = graph.op("MatMul", split, graph.weight("rotation", self.options.rotation))
        return graph.op("Reshape", rotated, graph.constant([-1, heads * head_dim]))


class Decoder(Layers):
    """All layers in one graph."""

    def run(self, steps: Sequence[Step]) -> None:
        """Put steps into the graph, in order; a sum and the norm of it are one operator."""
        at = 0
        while at < len(steps):
            match steps[at : at + 2]:
                case [Add(), Norm() as following]:
                    self._add_norm(following)
                    at += 2
                case [step, *_]:
                    super().run([step])
                    at += 1

    def attend(self, step: Attend, layer: int) -> None:
        """Projections, and between them what the library does for attention."""
        graph, options = self.graph, self.options
        # Under a name of its own if there is one: graphs are written once before means are known.
        centered = "mean_key" if options.mean_keys[layer].any() else "no_mean_key"
        mean = graph.weight(f"model.layers.{layer}.{centered}", options.mean_keys[layer])
        # Bit 0: queries and keys; bit 1: values, and back what attention makes of them; bit 2: the latter not.
        stays = options.rotates_values and not options.turns_back
        rotate = int(options.rotates) + 2 * int(options.rotates_values) + 4 * int(stays)
        inputs = [self.project_inputs(step), *self._angles_of(step), mean]
        if options.key_basis is not None:
            inputs += self.weights_of_basis(options.key_basis, layer)
        self.value = self.project_output(step, graph.op("Attention", *inputs, domain=KVQ, layer=layer, rotate=rotate))

    def _angles_of(self, step: Attend) -> tuple[str, str]:
        """The angles that a layer's heads are turned by: those of no turn where it has no rotary embedding."""
        if step.rotary is not None:
            return self.angles[step.rotary]
        if NO_TURN not in self.angles:
            half = self.shape.head_dim // 2
            self.angles[NO_TURN] = self._angles(Rotary(np.zeros(half, np.float32), np.ones(half, np.float32)))
        return self.angles[NO_TURN]

    def swiglu(self) -> str:
        return self.graph.op("SwiGLU", self.value, domain=KVQ)

    def turned(self, x: str, block: int) -> str:
        # What the library makes it rotates on the way, a vector that is still in the cache.
        return x if self.graph.extend(x, KVQ, block=block) else super().turned(x, block)

    def _add_norm(self, step: Norm) -> None:
        weights = gain(self.graph, self.checkpoint, step)
        inputs = (self.residual, self.value, weights)
        self.residual, self.value = self.graph.ops("AddNorm", 2, *inputs, domain=KVQ, epsilon=step.epsilon)
